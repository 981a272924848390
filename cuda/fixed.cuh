// Numbers as fixed point in signed bytes: v = sum of byte p * 256^(PLANES - 1 - p), in units of a power of two. Meaning
// and limits: csrc/cpu/qmatmul_avx512_prepare.h, which has three.
#pragma once
#include "number.cuh"

namespace hm {

// v * 2^n without a rounding where the result is a normal number; n in -149..149.
__device__ inline float scaled(float v, int n) {
  const int half = n / 2;
  return v * __uint_as_float(uint(127 + half) << 23) * __uint_as_float(uint(127 + n - half) << 23);
}

// Smallest e that lets the largest number, of these bits, be one of `most`'s mantissa times 2^e at most. Every f32 is a
// multiple of 2^-149: no e needs to be less than -126.
__device__ inline int fixed_exponent(uint largest, uint most) {
  const int e = int(largest >> 23) - 126 + ((largest & 0x7fffffu) > most ? 1 : 0);
  return e < -126 ? -126 : e;
}

template <int PLANES>
struct Fixed {
  static constexpr int BITS = 8 * PLANES - 1;
  // Mantissa above which the largest number needs a unit twice as large: |v| <= 127 * (256^(PLANES - 1) + ... + 1).
  static constexpr uint MOST = PLANES == 2 ? 8322560 : 8322814;
  static __device__ int exponent(uint largest) { return fixed_exponent(largest, MOST); }
  static __device__ int of(float v, int e) { return __float2int_rn(scaled(v, BITS - e)); }
  // What the integers are worth, or NaN where the largest number is no number.
  static __device__ float unit(uint largest, int e) {
    return largest < 0x7f800000u ? scaled(1.0f, e - BITS) : __uint_as_float(0x7fc00000u);
  }
};

// Of magnitudes as bits, over a warp: infinities and NaN compare above every number.
__device__ inline uint warp_largest(uint v) {
  HM_UNROLL for (int d = 16; d > 0; d /= 2) {
    const uint other = __shfl_xor_sync(FULL, v, d);
    v = v > other ? v : other;
  }
  return v;
}

// Byte `plane` of v, as bits.
template <int PLANES>
__device__ inline uint byte_of(int v, int plane) {
  HM_UNROLL for (int p = PLANES - 1; p > plane; p--) v = (v + 128) >> 8;
  return uint(v) & 255u;
}

}  // namespace hm
