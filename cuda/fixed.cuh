// Numbers as fixed point in signed bytes: v = sum of byte p * 256^(PLANES - 1 - p), in units of a power of two. Meaning
// and limits: csrc/cpu/qmatmul_avx512_prepare.h, which has three.
#pragma once
#include "number.cuh"

namespace hm {

template <int PLANES>
struct Fixed {
  static constexpr int BITS = 8 * PLANES - 1;
  // Mantissa above which the largest number needs a unit twice as large: |v| <= 127 * (256^(PLANES - 1) + ... + 1).
  static constexpr uint MOST = PLANES == 2 ? 8322560 : 8322814;
};

// Smallest e >= -126 that lets a number of these bits be at most the largest of BITS + 1 bits, times 2^(e - BITS).
__device__ inline int fixed_exponent(uint bits, uint most) {
  const int e = int(bits >> 23) - 126 + ((bits & 0x7fffffu) > most ? 1 : 0);
  return e < -126 ? -126 : e;
}

// v * 2^n without a rounding where the result is a normal number; n in -149..149.
__device__ inline float scaled(float v, int n) {
  const int half = n / 2;
  return v * __uint_as_float(uint(127 + half) << 23) * __uint_as_float(uint(127 + n - half) << 23);
}

// Byte `plane` of v, as bits.
template <int PLANES>
__device__ inline uint byte_of(int v, int plane) {
  HM_UNROLL for (int p = PLANES - 1; p > plane; p--) v = (v + 128) >> 8;
  return uint(v) & 255u;
}

}  // namespace hm
