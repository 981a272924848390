// The vector layer: f32 vectors of one ISA's natural width, and just what the kernels need of them.
//
//   Vec, kLanes                       zero() splat(f) load(p) store(p, v) load_n(p, n) store_n(p, v, n)
//   add sub mul fma(a, b, c)=a*b+c    sum(v)   (one fixed order of additions)
//   max_(a, b) max_of(v)              sums(v)  lane i: the sum of v[i], i < kLanes; its own fixed order
//   swap_lanes<H>(v)                  lane i takes lane i ^ H (H < kLanes, a power of two)
//   load_bf16(p) load_f16(p)          kLanes 16-bit numbers to f32; store_bf16, store_f16 round to even
//   lookup16(table, codes)            table[code] for kLanes u8 codes < 16, f32[16] table
//   codes8<bits>(p, v)                8 codes of a bit stream, LSB first, as f32 in v[8 / kLanes]; reads at most
//   table8<bits>(table, p, v)         12 bytes from p. table8: table[code]; f32[16], repeated after 2^bits
//   exp_(v)                           Cephes polynomial, <= 2 ulp on [-87, 88], 0 below, inf above
//
// Loads and stores never assume alignment. fma() is fused where the ISA fuses; generic rounds twice.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../core/numeric.h"

// Accumulators handed on by reference stay in registers only where the call is inlined.
#define HM_INLINE inline __attribute__((always_inline))

#if HM_ISA_AVX512
#include "vec_avx512.h"
#elif HM_ISA_AVX2
#include "vec_avx2.h"
#elif HM_ISA_NEON
#include "vec_neon.h"
#else
#include "vec_generic.h"
#endif

namespace hm {
namespace {

inline Vec load_n(const float* p, int n) {
  float t[kLanes] = {};
  memcpy(t, p, size_t(n) * 4);
  return load(t);
}

inline void store_n(float* p, Vec v, int n) {
  float t[kLanes];
  store(t, v);
  memcpy(p, t, size_t(n) * 4);
}

// exp(x) = 2^n * e^r, n = round(x / ln 2), r = x - n ln 2 in two pieces; degree-6 polynomial in r.
inline Vec exp_(Vec x) {
  Vec n = round_(mul(x, splat(1.44269504088896341f)));
  Vec r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = add(fma(mul(p, r), r, r), splat(1.0f));
  return scale_pow2(p, n, x);  // flushes below -87.3, saturates above 88.7, keeps NaN
}

// The largest lane.
inline float max_of(Vec v) {
  if constexpr (kLanes > 8) v = max_(v, swap_lanes<8>(v));
  if constexpr (kLanes > 4) v = max_(v, swap_lanes<4>(v));
  v = max_(v, swap_lanes<2>(v));
  v = max_(v, swap_lanes<1>(v));
  float lane[kLanes];
  store(lane, v);
  return lane[0];
}

inline Vec sigmoid(Vec x) { return div(splat(1.0f), add(splat(1.0f), exp_(sub(zero(), x)))); }
inline Vec silu(Vec x) { return mul(x, sigmoid(x)); }

// Storage dtypes of activations, in the order of hm_scale.
enum Dtype { kF32, kF16, kBf16 };
inline float load1(const void* p, int64_t i, Dtype d) {
  if (d == kF32) {
    float f;
    memcpy(&f, static_cast<const char*>(p) + 4 * i, 4);
    return f;
  }
  uint16_t h;
  memcpy(&h, static_cast<const char*>(p) + 2 * i, 2);
  return d == kF16 ? f16_to_f32(h) : bf16_to_f32(h);
}
inline void store1(void* p, int64_t i, float f, Dtype d) {
  if (d == kF32) {
    memcpy(static_cast<char*>(p) + 4 * i, &f, 4);
    return;
  }
  uint16_t h = d == kF16 ? f32_to_f16(f) : f32_to_bf16(f);
  memcpy(static_cast<char*>(p) + 2 * i, &h, 2);
}

// n numbers of dtype d to f32 and back.
inline void widen(const void* p, float* out, int64_t n, Dtype d) {
  if (d == kF32) {
    memcpy(out, p, size_t(n) * 4);
    return;
  }
  const uint16_t* h = static_cast<const uint16_t*>(p);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, d == kF16 ? load_f16(h + i) : load_bf16(h + i));
  for (; i < n; ++i) out[i] = load1(p, i, d);
}
inline void narrow(const float* in, void* p, int64_t n, Dtype d) {
  if (d == kF32) {
    memcpy(p, in, size_t(n) * 4);
    return;
  }
  uint16_t* h = static_cast<uint16_t*>(p);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    if (d == kF16)
      store_f16(h + i, load(in + i));
    else
      store_bf16(h + i, load(in + i));
  for (; i < n; ++i) store1(p, i, in[i], d);
}

}  // namespace
}  // namespace hm
