// Inline PTX. cuda_rewrite.py turns asm("text" : outputs : inputs) into ptx(text, {...}, {...}),
// which engine/ptx.cpp interprets.
#pragma once
#include "types.h"

namespace simt_cuda {
struct PtxOperand {
  char constraint;  // h 16 bits, r and f 32, l and d 64, n a number
  void* output;     // null for an input
  uint64_t value;
};
extern "C" void simt_ptx(const char* text, const PtxOperand* operands, int count, const char* file,
                         uint32_t line);

template <class T> PtxOperand ptx_output(const char* constraint, T& x) {
  static_assert(sizeof(T) <= 8, "PTX registers have at most 64 bits");
  uint64_t value = 0;
  memcpy(&value, &x, sizeof x);  // "+": also an input
  while (*constraint == '=' || *constraint == '+' || *constraint == '&') constraint++;
  return {*constraint, &x, value};
}
template <class T> PtxOperand ptx_input(const char* constraint, T x) {
  static_assert(sizeof(T) <= 8, "PTX registers have at most 64 bits");
  uint64_t value = 0;
  memcpy(&value, &x, sizeof x);
  return {*constraint, nullptr, value};
}
// Inlined, so that findings have the address of the statement.
__forceinline__ void ptx(const char* text, std::initializer_list<PtxOperand> outputs,
                         std::initializer_list<PtxOperand> inputs, SIMT_SITE) {
  PtxOperand all[64];
  int count = 0;
  for (const PtxOperand& o : outputs) all[count++] = o;
  for (const PtxOperand& o : inputs) all[count++] = o;
  simt_ptx(text, all, count, file, line);
}
}  // namespace simt_cuda
