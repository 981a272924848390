// Numbers as arrays store them: f32, f16 or bf16, which is known when a kernel runs, not when it is compiled.
#pragma once
#include "place.cuh"

namespace hm {

enum Number { F32, F16, BF16 };  // hadamoe.cuda_plan.NUMBERS

__device__ inline float from_bf16(uint bits) { return __uint_as_float(bits << 16); }
__device__ inline float from_f16(uint bits) { return __half2float(__ushort_as_half((unsigned short)bits)); }

__device__ inline float load_number(const void* p, size_t i, int dtype) {
  if (dtype == F32) return static_cast<const float*>(p)[i];
  const uint bits = static_cast<const unsigned short*>(p)[i];
  return dtype == F16 ? from_f16(bits) : from_bf16(bits);
}
__device__ inline void store_number(void* p, size_t i, int dtype, float v) {
  if (dtype == F32) static_cast<float*>(p)[i] = v;
  else if (dtype == F16) static_cast<unsigned short*>(p)[i] = __half_as_ushort(__float2half_rn(v));
  else static_cast<unsigned short*>(p)[i] = __bfloat16_as_ushort(__float2bfloat16_rn(v));
}

// v[0..8) = p[i..i + 8) of a row that begins at p's element `row` and has `columns` numbers, 0 behind them; i is a
// multiple of 8. Rows whose length is a multiple of 8 are read 16 bytes at a time.
__device__ inline void load_eight(const void* p, size_t row, int i, int columns, int dtype, float* v) {
  const size_t at = row + i;
  if (columns % 8) {
    EACH(j, 8) v[j] = i + j < columns ? load_number(p, at + j, dtype) : 0.0f;
  } else if (i >= columns) {
    EACH(j, 8) v[j] = 0.0f;
  } else if (dtype == F32) {
    const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(p) + at);
    const float4 a = from[0], b = from[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
  } else {
    const uint4 w = *reinterpret_cast<const uint4*>(static_cast<const unsigned short*>(p) + at);
    const uint words[4] = {w.x, w.y, w.z, w.w};
    EACH(j, 4) {
      v[2 * j] = dtype == F16 ? from_f16(words[j] & 0xffffu) : from_bf16(words[j] & 0xffffu);
      v[2 * j + 1] = dtype == F16 ? from_f16(words[j] >> 16) : from_bf16(words[j] >> 16);
    }
  }
}

}  // namespace hm
