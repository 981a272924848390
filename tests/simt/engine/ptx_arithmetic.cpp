// PTX that only moves and computes: integers, f32, pairs of 16-bit floats, bits and choices.
#include "ptx_machine.h"

namespace ptx {
namespace {
// ---- integers: 64-bit numbers cut to the type's width
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
  m.set(i.operands[0], cut_to(i.type()[0] == 's' ? extended(a, bits) >> by : a >> by, bits));
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
}  // namespace

Entries arithmetic_instructions() {
  using U = uint64_t;
  return {
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
  };
}
}  // namespace ptx
