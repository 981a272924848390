// What the interpreter's instructions share: registers, types, and how an instruction is described.
#pragma once
#include <functional>

#include "../include/cuda/simt_cuda/half.h"
#include "../include/cuda/simt_cuda/math.h"
#include "../include/cuda/simt_cuda/matrix.h"
#include "../include/cuda/simt_cuda/memory.h"
#include "../include/cuda/simt_cuda/ptx.h"
#include "ptx_parse.h"

extern "C" char* simt_arena_base();

namespace ptx {
using namespace simt_cuda;

// The width of a type such as s32, f16x2 or pred; 0 for what is none.
inline int bits_of(const std::string& type) {
  if (type == "pred") return 1;
  if (type == "f16x2" || type == "bf16x2") return 32;
  const size_t digits = type.find_first_of("0123456789");
  return digits == std::string::npos ? 0 : atoi(type.c_str() + digits);
}
inline uint64_t cut_to(uint64_t v, int bits) { return bits >= 64 ? v : v & ((1ull << bits) - 1); }
inline int64_t extended(uint64_t v, int bits) { return int64_t(v << (64 - bits)) >> (64 - bits); }

// The registers of one thread in one asm statement.
struct Machine {
  uint64_t* registers;
  const char* file;
  uint32_t line;
  void* pc;  // of the asm statement
  const PtxOperand* operands;

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

// Does one instruction; false where its type or modifiers are not known here.
using Action = std::function<bool(const Machine&, const Instruction&)>;
struct Entry {
  Action run;
  size_t operands;  // at least
};
using Entries = std::map<std::string, Entry>;
Entries arithmetic_instructions();
Entries memory_instructions();  // and matrices
Entries warpgroup_instructions();
}  // namespace ptx
