// What becomes of a row on its way to codes and back. A warp holds it in registers, lane l the columns l, l + 32, ..: the
// order in which csrc/cpu/kv_encode.h adds, so that codes and scales have its bits. Products that are added are rounded
// first (__fmul_rn), as there.
#pragma once
#include "place.cuh"

namespace hm {

// H in place on a row, not scaled, neighbours first.
template <int N>
__device__ inline void walsh_hadamard(float* v) {
  HM_UNROLL for (int h = 1; h < 32; h *= 2) {
    EACH(i, N) {
      const float other = __shfl_xor_sync(FULL, v[i], h);
      v[i] = lane_index() & h ? other - v[i] : v[i] + other;
    }
  }
  HM_UNROLL for (int h = 1; h < N; h *= 2) {
    EACH(i, N) {
      if (i & h) continue;
      const float a = v[i], b = v[i + h];
      v[i] = a + b;
      v[i + h] = a - b;
    }
  }
}
// Sum of a row in one order, the same in every lane.
template <int N>
__device__ inline float row_sum(const float* v) {
  float sum = v[0];
  HM_UNROLL for (int i = 1; i < N; i++) sum += v[i];
  return warp_sum(sum);
}
// The largest size of a row's numbers; NaN where there is one (after a transform: in all).
template <int N>
__device__ inline float row_most(const float* v) {
  float most = 0.0f;
  EACH(i, N) most = fabsf(v[i]) <= most ? most : fabsf(v[i]);
  HM_UNROLL for (int h = 16; h > 0; h /= 2) {
    const float other = __shfl_xor_sync(FULL, most, h);
    most = other <= most ? most : other;
  }
  return most;
}
__device__ inline int to_level(float x) {
  x = x < 127.0f ? x : 127.0f;
  return int(rintf(x > -127.0f ? x : -127.0f));
}

// A query turned as keys are (signs are +-1) and made whole numbers up to 127, in floats; returns their unit, the same in
// every lane.
template <int N>
__device__ inline float query_row(float* v, const float* signs, float root) {
  EACH(i, N) v[i] *= signs[lane_index() + 32 * i];
  walsh_hadamard<N>(v);
  EACH(i, N) v[i] *= root;
  const float most = row_most<N>(v), unit = most > 0.0f ? __fdiv_rn(most, 127.0f) : 1.0f;
  EACH(i, N) v[i] = float(to_level(__fdiv_rn(v[i], unit)));
  return unit;
}

}  // namespace hm
