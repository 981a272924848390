// PTX that touches memory, and matrix fragments.
#include "ptx_machine.h"

namespace ptx {
namespace {
// ---- memory
bool memory_access(const Machine& m, const Instruction& i, bool write) {
  const Operand& place = i.operands[write ? 0 : 1];
  const Operand& value = i.operands[write ? 1 : 0];
  const int bytes = bits_of(i.type()) / 8;
  const size_t count = i.has("v4") ? 4 : i.has("v2") ? 2 : 1;
  if (!bytes || place.kind != Operand::ADDRESS) return false;
  if (count != (value.kind == Operand::LIST ? value.list.size() : 1)) return false;
  if (!i.has("global") && !i.has("shared")) return false;
  char* at = m.address(place, i.has("shared"));
  if (i.has("acquire") || i.has("release") || i.has("relaxed"))
    simt_note_atomic(at, bytes * count, write, m.pc);
  else
    simt_note_range(at, bytes * count, write, m.pc);
  for (size_t k = 0; k < count; k++) {
    const Operand& part = count == 1 ? value : value.list[k];
    uint64_t v = write ? m.get(part) : 0;
    if (write) {
      memcpy(at + k * bytes, &v, bytes);
    } else {
      memcpy(&v, at + k * bytes, bytes);
      m.set(part, i.type()[0] == 's' ? cut_to(extended(v, 8 * bytes), 64) : v);
    }
  }
  return true;
}
bool load(const Machine& m, const Instruction& i) { return memory_access(m, i, false); }
bool store(const Machine& m, const Instruction& i) { return memory_access(m, i, true); }
// red has no result, atom returns the old value.
bool atomic_add(const Machine& m, const Instruction& i) {
  const bool returns = i.name() == "atom";
  if (!i.has("add") || i.operands.size() != 2u + returns) return false;
  const Operand& place = i.operands[returns];
  if (place.kind != Operand::ADDRESS) return false;
  char* at = m.address(place, i.has("shared"));
  const uint64_t by = m.get(i.operands[1 + returns]);
  uint64_t old;
  if (i.type() == "f32")
    old = bits<uint32_t>(atomicAdd(reinterpret_cast<float*>(at), bits<float>(uint32_t(by))));
  else if (bits_of(i.type()) == 32 && i.type()[0] != 'f' && i.type()[0] != 'b')
    old = atomicAdd(reinterpret_cast<uint32_t*>(at), uint32_t(by));
  else
    return false;
  if (returns) m.set(i.operands[0], old);
  return true;
}
// cp.async.cg.shared.global [to], [from], bytes{, bytes read}{, cache policy}
bool copy_async(const Machine& m, const Instruction& i) {
  if (!i.has("async") || i.has("bulk")) return false;
  if (i.has("commit_group")) {
    simt_copy_commit();
  } else if (i.has("wait_group") && i.operands.size() == 1) {
    simt_copy_wait(int(m.get(i.operands[0])), m.pc);
  } else if (i.has("wait_all")) {
    simt_copy_commit();
    simt_copy_wait(0, m.pc);
  } else {
    if (i.operands.size() < 3 || !i.has("global")) return false;
    const int bytes = int(m.get(i.operands[2]));
    const size_t policies = i.has("cache_hint");
    const int read = i.operands.size() > 3 + policies ? int(m.get(i.operands[3])) : bytes;
    simt_copy_async(m.address(i.operands[0], true), m.address(i.operands[1], false), bytes,
                    bytes - read);
  }
  return true;
}

// ---- matrices
bool load_matrix(const Machine& m, const Instruction& i) {
  if (!i.has("m8n8") || i.type() != "b16") return false;
  const Operand& out = i.operands[0];
  const int count = i.has("x4") ? 4 : i.has("x2") ? 2 : 1;
  if (count != (out.kind == Operand::LIST ? int(out.list.size()) : 1)) return false;
  uint32_t words[4];
  const bool transposed = i.has("trans");
  simt_ldmatrix(m.address(i.operands[1], true), words, count, transposed, m.file, m.line, m.pc);
  for (int k = 0; k < count; k++) m.set(out.kind == Operand::LIST ? out.list[k] : out, words[k]);
  return true;
}
bool multiply_matrix(const Machine& m, const Instruction& i) {
  static const std::map<std::string, int> kinds = {
      {"m16n8k16.row.col.f32.f16.f16.f32", F16},
      {"m16n8k16.row.col.f32.bf16.bf16.f32", BF16},
      {"m16n8k32.row.col.s32.s8.s8.s32", S8},
      {"m16n8k32.row.col.s32.u8.u8.s32", U8},
      {"m16n8k32.row.col.s32.u8.s8.s32", U8_S8},
  };
  const size_t head = i.text.find("mma.sync.aligned.");
  if (head == std::string::npos) return false;
  const size_t start = head + strlen("mma.sync.aligned.");
  const auto kind = kinds.find(i.text.substr(start, i.text.find_first_of(" \t\n", start) - start));
  const size_t sizes[] = {4, 4, 2, 4};
  if (kind == kinds.end()) return false;
  for (int k = 0; k < 4; k++)
    if (i.operands[k].list.size() != sizes[k]) return false;
  Product p;
  for (int k = 0; k < 4; k++) p.a[k] = m.get(i.operands[1].list[k]);
  for (int k = 0; k < 2; k++) p.b[k] = m.get(i.operands[2].list[k]);
  for (int k = 0; k < 4; k++) p.c[k] = m.get(i.operands[3].list[k]);
  simt_mma(&p, kind->second, m.file, m.line);
  for (int k = 0; k < 4; k++) m.set(i.operands[0].list[k], p.d[k]);
  return true;
}

bool nothing(const Machine&, const Instruction&) { return true; }
}  // namespace

Entries memory_instructions() {
  return {
      {"ld", {load, 2}},
      {"st", {store, 2}},
      {"red", {atomic_add, 2}},
      {"atom", {atomic_add, 3}},
      {"cp", {copy_async, 0}},
      {"ldmatrix", {load_matrix, 2}},
      {"mma", {multiply_matrix, 4}},
      {"fence", {nothing, 0}},  // blocks run one after another
      {"membar", {nothing, 0}},
      {"createpolicy", {nothing, 0}},
      {"prefetch", {nothing, 0}},
      {"griddepcontrol", {nothing, 0}},  // launches run one after another
  };
}
}  // namespace ptx
