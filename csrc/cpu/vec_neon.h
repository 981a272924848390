// 4 lanes of NEON (Armv8.0, the baseline of 64-bit Arm). Meanings in vec.h.
#pragma once
#include <arm_neon.h>

namespace hm {
namespace {

constexpr int kLanes = 4;
using Vec = float32x4_t;

inline Vec zero() { return vdupq_n_f32(0); }
inline Vec splat(float s) { return vdupq_n_f32(s); }
inline Vec load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Vec v) { vst1q_f32(p, v); }
inline Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
inline Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
inline Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
inline Vec div(Vec a, Vec b) { return vdivq_f32(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
inline float sum(Vec v) {
  float32x2_t s = vadd_f32(vget_low_f32(v), vget_high_f32(v));
  return vget_lane_f32(s, 0) + vget_lane_f32(s, 1);
}
inline Vec max_(Vec a, Vec b) { return vmaxq_f32(a, b); }
inline Vec sums(const Vec* v) { return vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3])); }
inline Vec round_(Vec a) { return vrndnq_f32(a); }
inline Vec scale_pow2(Vec p, Vec n, Vec x) {
  int32x4_t e = vcvtq_s32_f32(n), half = vshrq_n_s32(e, 1), bias = vdupq_n_s32(127);  // 2^128 is not a float
  Vec a = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, bias), 23));
  Vec b = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vsubq_s32(e, half), bias), 23));
  Vec y = mul(mul(p, a), b);
  y = vbslq_f32(vcltq_f32(x, splat(-87.33654f)), zero(), y);
  y = vbslq_f32(vcgtq_f32(x, splat(88.72283f)), splat(bits_to_f32(0x7f800000u)), y);
  return vbslq_f32(vceqq_f32(x, x), y, x);
}
template <int H>
inline Vec swap_lanes(Vec v) {
  return H == 1 ? vrev64q_f32(v) : vextq_f32(v, v, 2);
}
inline Vec load_bf16(const uint16_t* p) {
  uint64_t u;
  memcpy(&u, p, 8);
  return vreinterpretq_f32_u32(vshll_n_u16(vcreate_u16(u), 16));
}
inline Vec load_f16(const uint16_t* p) {
  uint64_t u;
  memcpy(&u, p, 8);
  return vcvt_f32_f16(vreinterpret_f16_u64(vcreate_u64(u)));
}
inline void store_bf16(uint16_t* p, Vec v) {
  uint32x4_t u = vreinterpretq_u32_f32(v), high = vshrq_n_u32(u, 16);
  uint32x4_t odd = vandq_u32(high, vdupq_n_u32(1));
  uint32x4_t r = vshrq_n_u32(vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
  r = vbslq_u32(vceqq_f32(v, v), r, vorrq_u32(high, vdupq_n_u32(0x40)));
  uint64_t packed = vget_lane_u64(vreinterpret_u64_u16(vmovn_u32(r)), 0);
  memcpy(p, &packed, 8);
}
inline void store_f16(uint16_t* p, Vec v) {
  uint64_t packed = vget_lane_u64(vreinterpret_u64_f16(vcvt_f16_f32(v)), 0);
  memcpy(p, &packed, 8);
}
inline Vec lookup16(const float* table, const uint8_t* codes) {
  float t[4] = {table[codes[0]], table[codes[1]], table[codes[2]], table[codes[3]]};
  return load(t);
}

// Codes 4 * half .. 4 * half + 3.
template <int kBits>
inline uint32x4_t code_lanes(const uint8_t* p, int half) {
  constexpr int b = kBits;
  const int first = 4 * kBits * half, r = first % 8;
  uint32_t word;
  memcpy(&word, p + first / 8, 4);
  const int32_t shift[4] = {-r, -r - b, -r - 2 * b, -r - 3 * b};
  return vandq_u32(vshlq_u32(vdupq_n_u32(word), vld1q_s32(shift)), vdupq_n_u32((1u << kBits) - 1));
}
template <int kBits>
inline void codes8(const uint8_t* p, Vec* v) {
  for (int half = 0; half < 2; ++half) v[half] = vcvtq_f32_u32(code_lanes<kBits>(p, half));
}
template <int kBits>
inline void table8(const float* table, const uint8_t* p, Vec* v) {
  const uint8x16x4_t bytes = vld1q_u8_x4(reinterpret_cast<const uint8_t*>(table));
  for (int half = 0; half < 2; ++half) {  // the four bytes of entry c start at 4 c
    const uint32x4_t at = vmlaq_u32(vdupq_n_u32(0x03020100), code_lanes<kBits>(p, half), vdupq_n_u32(0x04040404));
    v[half] = vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_u32(at)));
  }
}

}  // namespace
}  // namespace hm
