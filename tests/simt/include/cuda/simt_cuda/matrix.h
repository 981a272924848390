// Matrix fragments of a warp, in the layouts of the PTX ISA. Entry points of engine/cuda_rt.cpp.
#pragma once
#include "types.h"

namespace simt_cuda {
enum Multiplicand { F16, BF16, S8, U8, U8_S8 };  // U8_S8: A unsigned, B signed
// D = A * B + C of one warp. m16n8k16 of f16 or bf16 into f32; m16n8k32 of bytes into s32.
// A is 4 registers, B is 2, C and D are 4 numbers.
struct Product {
  uint32_t a[4], b[2], c[4], d[4];
};
extern "C" {
void simt_mma(Product* p, int multiplicand, const char* file, uint32_t line);
// 8x8 matrices of 16-bit numbers: lane 8 i + r gives the address of row r of matrix i.
void simt_ldmatrix(const void* row, uint32_t* out, int count, bool transposed, const char* file,
                   uint32_t line, void* pc);
}
}  // namespace simt_cuda
