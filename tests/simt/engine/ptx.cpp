// Interprets the inline PTX of CUDA kernels. An instruction that is not here is a finding
// (unknown-ptx), never skipped; so is one whose type or modifiers are not here.
#include "ptx_parse.h"

#include <functional>
#include <memory>
#include <mutex>

#include "../include/cuda/simt_cuda/half.h"
#include "../include/cuda/simt_cuda/math.h"
#include "../include/cuda/simt_cuda/matrix.h"
#include "../include/cuda/simt_cuda/memory.h"
#include "../include/cuda/simt_cuda/ptx.h"

using namespace simt_cuda;
using ptx::Instruction;
using ptx::Operand;
extern "C" char* simt_arena_base();

namespace {

int bits_of(const std::string& type) {
  if (type == "pred") return 1;
  if (type == "f16x2" || type == "bf16x2") return 32;
  const size_t digits = type.find_first_of("0123456789");
  return digits == std::string::npos ? 0 : atoi(type.c_str() + digits);
}
uint64_t cut_to(uint64_t v, int bits) { return bits >= 64 ? v : v & ((1ull << bits) - 1); }
int64_t extended(uint64_t v, int bits) { return int64_t(v << (64 - bits)) >> (64 - bits); }

struct Machine {
  uint64_t* registers;
  const char* file;
  uint32_t line;

  // A list or an address where a register belongs reads as 0; its instruction refuses it.
  uint64_t get(const Operand& o) const {
    if (o.kind == Operand::NUMBER) return o.number;
    return o.kind == Operand::REGISTER ? registers[o.reg] : 0;
  }
  float get_float(const Operand& o) const { return bits<float>(uint32_t(get(o))); }
  void set(const Operand& o, uint64_t v) const {
    if (o.kind == Operand::REGISTER) registers[o.reg] = v;
  }
  void set_float(const Operand& o, float v) const { set(o, bits<uint32_t>(v)); }
  // Shared addresses have 32 bits: the upper half is the arena's.
  char* address(const Operand& o, bool shared) const {
    uint64_t a = (o.reg < 0 ? 0 : registers[o.reg]) + o.number;
    if (shared) a = (uint64_t(simt_arena_base()) & ~0xffffffffull) | uint32_t(a);
    return reinterpret_cast<char*>(a);
  }
};

using Action = std::function<bool(const Machine&, const Instruction&)>;

// ---- integers: all are 64-bit numbers cut to the type's width
using Binary = uint64_t (*)(uint64_t a, uint64_t b, int bits);
Action integer(Binary f) {
  return [f](const Machine& m, const Instruction& i) {
    const int bits = bits_of(i.type());
    if (!bits || i.type()[0] == 'f') return false;
    const uint64_t a = cut_to(m.get(i.operands[1]), bits), b = cut_to(m.get(i.operands[2]), bits);
    m.set(i.operands[0], cut_to(f(a, b, bits), bits));
    return true;
  };
}
uint64_t shifted_left(uint64_t a, uint64_t b, int bits) { return b >= uint64_t(bits) ? 0 : a << b; }
bool shift_right(const Machine& m, const Instruction& i) {
  const int bits = bits_of(i.type());
  const uint64_t by = std::min<uint64_t>(uint32_t(m.get(i.operands[2])), 63);
  const uint64_t a = cut_to(m.get(i.operands[1]), bits);
  const bool sign = i.type()[0] == 's';
  m.set(i.operands[0], cut_to(sign ? uint64_t(extended(a, bits) >> by) : a >> by, bits));
  return bits > 0;
}

// ---- f32, and pairs of f16 or bf16
using Ternary = float (*)(float a, float b, float c);
template <class T> uint64_t in_pairs(Ternary f, const uint64_t v[3]) {
  uint64_t result = 0;
  for (int half = 0; half < 32; half += 16) {
    const float r = f(T::of_bits(v[0] >> half), T::of_bits(v[1] >> half), T::of_bits(v[2] >> half));
    result |= uint64_t(T(r).x) << half;
  }
  return result;
}
// a op b, or a * b + c, by type; `whole` is for f32, `narrow` leaves one rounding to 16 bits.
bool floating(const Machine& m, const Instruction& i, Ternary whole, Ternary narrow) {
  if (i.has("rz") || i.has("rm") || i.has("rp") || i.has("sat") || i.has("relu")) return false;
  uint64_t v[3] = {};
  for (size_t k = 1; k < i.operands.size() && k < 4; k++) v[k - 1] = m.get(i.operands[k]);
  if (i.type() == "f32")
    m.set_float(i.operands[0], whole(bits<float>(uint32_t(v[0])), bits<float>(uint32_t(v[1])),
                                     bits<float>(uint32_t(v[2]))));
  else if (i.type() == "f16x2")
    m.set(i.operands[0], in_pairs<__half>(narrow, v));
  else if (i.type() == "bf16x2")
    m.set(i.operands[0], in_pairs<__nv_bfloat16>(narrow, v));
  else
    return false;
  return true;
}
float plus(float a, float b, float) { return a + b; }
float minus(float a, float b, float) { return a - b; }
float times(float a, float b, float) { return a * b; }
float fused_f32(float a, float b, float c) { return fmaf(a, b, c); }
bool is_float(const Instruction& i) {
  return i.type()[0] == 'f' || i.type().rfind("bf16", 0) == 0;
}

Action arithmetic(Ternary on_floats, Binary on_integers) {
  const Action integers = integer(on_integers);
  return [=](const Machine& m, const Instruction& i) {
    if (is_float(i)) return floating(m, i, on_floats, on_floats);
    return (!i.has("hi") && !i.has("wide") && !i.has("sat")) && integers(m, i);
  };
}
bool fused_multiply_add(const Machine& m, const Instruction& i) {
  return floating(m, i, fused_f32, fused);
}
bool multiply_add(const Machine& m, const Instruction& i) {
  if (!i.has("lo") || bits_of(i.type()) != 32) return false;
  const uint64_t product = m.get(i.operands[1]) * m.get(i.operands[2]);
  m.set(i.operands[0], uint32_t(product + m.get(i.operands[3])));
  return true;
}
bool exp2_f32(const Machine& m, const Instruction& i) {
  if (i.type() != "f32") return false;
  m.set_float(i.operands[0], exp2f(m.get_float(i.operands[1])));
  return true;
}

// ---- bits and choices
// A list on either side is the parts of one number, the lowest first.
bool move(const Machine& m, const Instruction& i) {
  const Operand &to = i.operands[0], &from = i.operands[1];
  const int bits = bits_of(i.type());
  uint64_t value = m.get(from);
  if (from.kind == Operand::LIST) {
    const int each = bits / int(from.list.size());
    for (size_t k = 0; k < from.list.size(); k++)
      value |= cut_to(m.get(from.list[k]), each) << (k * each);
  }
  if (to.kind == Operand::LIST) {
    const int each = bits / int(to.list.size());
    for (size_t k = 0; k < to.list.size(); k++) m.set(to.list[k], cut_to(value >> k * each, each));
  }
  m.set(to, cut_to(value, bits));
  return bits > 0 && from.kind != Operand::ADDRESS;
}
bool invert(const Machine& m, const Instruction& i) {
  m.set(i.operands[0], cut_to(~m.get(i.operands[1]), bits_of(i.type())));
  return true;
}
// Any function of three bits: its value for (a, b, c) is bit 4a + 2b + c of the table.
bool lop3(const Machine& m, const Instruction& i) {
  if (i.type() != "b32") return false;
  const uint32_t a = m.get(i.operands[1]), b = m.get(i.operands[2]), c = m.get(i.operands[3]);
  const uint32_t table = m.get(i.operands[4]);
  uint32_t r = 0;
  for (int row = 0; row < 8; row++)
    if (table >> row & 1) r |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  m.set(i.operands[0], r);
  return true;
}
bool permute_bytes(const Machine& m, const Instruction& i) {
  if (i.type() != "b32" || i.parts.size() != 2) return false;
  m.set(i.operands[0],
        __byte_perm(m.get(i.operands[1]), m.get(i.operands[2]), m.get(i.operands[3])));
  return true;
}
bool funnel_shift(const Machine& m, const Instruction& i) {
  if (!i.has("wrap")) return false;
  auto shift = i.has("l") ? __funnelshift_l : __funnelshift_r;
  m.set(i.operands[0], shift(m.get(i.operands[1]), m.get(i.operands[2]), m.get(i.operands[3])));
  return true;
}
template <class T> bool holds(const std::string& relation, T a, T b, bool* known) {
  *known = true;
  if (relation == "eq") return a == b;
  if (relation == "ne") return a != b;
  if (relation == "lt") return a < b;
  if (relation == "le") return a <= b;
  if (relation == "gt") return a > b;
  if (relation == "ge") return a >= b;
  *known = false;
  return false;
}
bool set_predicate(const Machine& m, const Instruction& i) {
  if (i.parts.size() != 3) return false;
  const int bits = bits_of(i.type());
  const uint64_t a = m.get(i.operands[1]), b = m.get(i.operands[2]);
  bool known = false, result;
  if (i.type() == "f32")
    result = holds(i.parts[1], m.get_float(i.operands[1]), m.get_float(i.operands[2]), &known);
  else if (i.type()[0] == 's')
    result = holds(i.parts[1], extended(a, bits), extended(b, bits), &known);
  else
    result = holds(i.parts[1], cut_to(a, bits), cut_to(b, bits), &known);
  m.set(i.operands[0], result);
  return known && bits > 0;
}
bool select(const Machine& m, const Instruction& i) {
  m.set(i.operands[0], m.get(i.operands[m.get(i.operands[3]) ? 1 : 2]));
  return true;
}

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
    simt_note_atomic(at, bytes * count, write, nullptr);
  else
    simt_note_range(at, bytes * count, write);
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
    simt_copy_wait(int(m.get(i.operands[0])));
  } else if (i.has("wait_all")) {
    simt_copy_commit();
    simt_copy_wait(0);
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
  simt_ldmatrix(m.address(i.operands[1], true), words, count, i.has("trans"), m.file, m.line);
  for (int k = 0; k < count; k++) m.set(out.kind == Operand::LIST ? out.list[k] : out, words[k]);
  return true;
}
bool multiply_matrix(const Machine& m, const Instruction& i) {
  static const std::map<std::string, int> kinds = {
      {"m16n8k16.row.col.f32.f16.f16.f32", F16},
      {"m16n8k16.row.col.f32.bf16.bf16.f32", BF16},
      {"m16n8k32.row.col.s32.s8.s8.s32", S8},
      {"m16n8k32.row.col.s32.u8.u8.s32", U8},
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

struct Entry {
  Action run;
  size_t operands;  // at least
};
const std::map<std::string, Entry>& entries() {
  using U = uint64_t;
  static const std::map<std::string, Entry> all = {
      {"add", {arithmetic(plus, [](U a, U b, int) { return a + b; }), 3}},
      {"sub", {arithmetic(minus, [](U a, U b, int) { return a - b; }), 3}},
      {"mul", {arithmetic(times, [](U a, U b, int) { return a * b; }), 3}},
      {"mad", {multiply_add, 4}},
      {"fma", {fused_multiply_add, 4}},
      {"and", {integer([](U a, U b, int) { return a & b; }), 3}},
      {"or", {integer([](U a, U b, int) { return a | b; }), 3}},
      {"xor", {integer([](U a, U b, int) { return a ^ b; }), 3}},
      {"shl", {integer(shifted_left), 3}},
      {"shr", {shift_right, 3}},
      {"not", {invert, 2}},
      {"mov", {move, 2}},
      {"lop3", {lop3, 5}},
      {"prmt", {permute_bytes, 4}},
      {"shf", {funnel_shift, 4}},
      {"setp", {set_predicate, 3}},
      {"selp", {select, 4}},
      {"ex2", {exp2_f32, 2}},
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
  };
  return all;
}

const ptx::Program& program(const char* text, int operands) {
  static std::mutex mutex;
  static std::map<std::pair<std::string, int>, std::unique_ptr<ptx::Program>> read;
  std::lock_guard<std::mutex> lock(mutex);
  auto& slot = read[{text, operands}];
  if (!slot) slot.reset(new ptx::Program(ptx::Parser(text, operands).take()));
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
  const ptx::Program& p = program(text, count);
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
  const Machine machine{registers.data(), file, line};
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
