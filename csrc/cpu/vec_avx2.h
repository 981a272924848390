// 8 lanes of AVX2, FMA and F16C. Meanings in vec.h.
#pragma once
#include <immintrin.h>

namespace hm {
namespace {

constexpr int kLanes = 8;
using Vec = __m256;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec splat(float s) { return _mm256_set1_ps(s); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Vec v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline Vec max_(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec sums(const Vec* v) {
  const Vec a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const Vec b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
inline Vec round_(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec scale_pow2(Vec p, Vec n, Vec x) {
  __m256i e = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(e, 1);  // two steps: 2^128 is not a float
  __m256i bias = _mm256_set1_epi32(127);
  Vec a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  Vec b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(e, half), bias), 23));
  Vec y = mul(mul(p, a), b);
  y = _mm256_blendv_ps(y, zero(), _mm256_cmp_ps(x, splat(-87.33654f), _CMP_LT_OQ));
  y = _mm256_blendv_ps(y, splat(bits_to_f32(0x7f800000u)), _mm256_cmp_ps(x, splat(88.72283f), _CMP_GT_OQ));
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
template <int H>
inline Vec swap_lanes(Vec v) {
  if constexpr (H == 4) return _mm256_permute2f128_ps(v, v, 1);
  return _mm256_permute_ps(v, H == 1 ? 0xB1 : 0x4E);
}
inline Vec load_bf16(const uint16_t* p) {
  __m256i u = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
}
inline Vec load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store_bf16(uint16_t* p, Vec v) {
  __m256i u = _mm256_castps_si256(v), one = _mm256_set1_epi32(1);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), one);
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  r = _mm256_blendv_epi8(r, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store_f16(uint16_t* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Vec lookup16(const float* table, const uint8_t* codes) {
  __m256i c = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
  Vec low = _mm256_permutevar8x32_ps(load(table), c), high = _mm256_permutevar8x32_ps(load(table + 8), c);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(c, 28)));
}

// Code i in the low bits of lane i, others above it. Lanes 4 to 7 shift a word of their own: 4 codes fit.
template <int kBits>
inline __m256i code_lanes(const uint8_t* p) {
  if (kBits == 8) return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  constexpr int kSecond = 4 * kBits / 8, r = 4 * kBits % 8, b = kBits;
  int32_t low, high;
  memcpy(&low, p, 4);
  memcpy(&high, p + kSecond, 4);
  if (kBits <= 4) {
    const __m256i shift = _mm256_setr_epi32(0, b, 2 * b, 3 * b, 4 * b, 5 * b, 6 * b, 7 * b);
    return _mm256_srlv_epi32(_mm256_set1_epi32(low), shift);
  }
  const __m256i words = _mm256_set_m128i(_mm_set1_epi32(high), _mm_set1_epi32(low));
  return _mm256_srlv_epi32(words, _mm256_setr_epi32(0, b, 2 * b, 3 * b, r, r + b, r + 2 * b, r + 3 * b));
}
template <int kBits>
inline void codes8(const uint8_t* p, Vec* v) {
  *v = _mm256_cvtepi32_ps(_mm256_and_si256(code_lanes<kBits>(p), _mm256_set1_epi32((1 << kBits) - 1)));
}
template <int kBits>
inline void table8(const float* table, const uint8_t* p, Vec* v) {
  const __m256i c = code_lanes<kBits>(p);
  *v = _mm256_permutevar8x32_ps(load(table), c);  // takes the low 3 bits
  if (kBits < 4) return;
  const Vec upper = _mm256_permutevar8x32_ps(load(table + 8), c);
  *v = _mm256_blendv_ps(*v, upper, _mm256_castsi256_ps(_mm256_slli_epi32(c, 28)));
}

}  // namespace
}  // namespace hm
