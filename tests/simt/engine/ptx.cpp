// Interprets the inline PTX of CUDA kernels. An instruction that is not here is a finding
// (unknown-ptx), never skipped; so is one whose type or modifiers are not here.
#include <memory>
#include <mutex>

#include "ptx_machine.h"

namespace ptx {
namespace {
const Entries& entries() {
  static const Entries all = [] {
    Entries both = arithmetic_instructions();
    both.merge(memory_instructions());
    both.merge(warpgroup_instructions());
    return both;
  }();
  return all;
}

const Program& program(const char* text, int operands) {
  static std::mutex mutex;
  static std::map<std::pair<std::string, int>, std::unique_ptr<Program>> read;
  std::lock_guard<std::mutex> lock(mutex);
  auto& slot = read[{text, operands}];
  if (!slot) slot.reset(new Program(Parser(text, operands).take()));
  return *slot;
}
uint64_t special_register(const std::string& name, bool* known) {
  if (name == "laneid") return lane();
  if (name == "warpid") return tls.cur->simd;
  if (name == "tid.x") return tls.cur->tid.x;
  if (name == "ctaid.x") return tls.g.gid.x;
  *known = false;
  return 0;
}
int bytes_of(char constraint) {
  return constraint == 'h' ? 2 : strchr("ldn", constraint) ? 8 : 4;
}
}  // namespace

extern "C" __attribute__((visibility("default"))) void simt_ptx(
    const char* text, const PtxOperand* operands, int count, const char* file, uint32_t line) {
  const Program& p = program(text, count);
  auto unknown = [&](const std::string& what) {
    simt_fail("unknown-ptx", what.c_str(), file, line);
  };
  if (!p.error.empty()) return unknown(p.error + " in " + text);
  std::vector<uint64_t> registers(p.registers);
  for (int i = 0; i < count; i++)
    registers[i] = cut_to(operands[i].value, 8 * bytes_of(operands[i].constraint));
  for (const auto& special : p.special) {
    bool known = true;
    registers[special.first] = special_register(special.second, &known);
    if (!known) unknown("%" + special.second);
  }
  const Machine machine{registers.data(), file, line, __builtin_return_address(0),
                        operands};
  for (const Instruction& i : p.instructions) {
    if (i.predicate >= 0 && bool(registers[i.predicate]) == i.negated) continue;
    const auto entry = entries().find(i.name());
    if (entry == entries().end() || i.operands.size() < entry->second.operands ||
        !entry->second.run(machine, i))
      unknown(i.text);
  }
  for (int i = 0; i < count; i++)
    if (operands[i].output)
      memcpy(operands[i].output, &registers[i], bytes_of(operands[i].constraint));
}
}  // namespace ptx
