// One block of codes in AVX-512's qmatmul: unpack, multiply, add, and bring integer sums to f32 under their
// scales. The equations and the order of lanes are in qmatmul_avx512.h.
#pragma once
#include "qmatmul_avx512_prepare.h"

namespace hm {
namespace {

#define HM_INLINE inline __attribute__((always_inline))
// Arrays of vectors stay in registers only where every loop over them is unrolled.
#define HM_UNROLL _Pragma("GCC unroll 8")

// Integer sums of one token. With one token every product has its own chain of additions, since a chain
// advances once in 5 cycles; four tokens fill those cycles and share by weight.
template <int kKind, int kTokens>
constexpr int kChains = kKind == kPair                   ? 5
                        : kKind == kWide && kTokens == 1 ? 6
                                                         : 3;

template <int kKind, int kTokens>
struct Sums {
  __m512i s[kTokens][kChains<kKind, kTokens>];
  inline void clear() {
    HM_UNROLL
    for (int t = 0; t < kTokens; ++t) HM_UNROLL
    for (int i = 0; i < kChains<kKind, kTokens>; ++i) s[t][i] = _mm512_setzero_si512();
  }
};

inline __m512i dot(__m512i sum, __m512i u, __m512i x) {
  return _mm512_dpbusd_epi32(sum, u, x);
}

// Bytes of x that several products use: kept in a register, where the compiler would load them for each.
inline __m512i load_once(const int8_t* p) {
  __m512i v = _mm512_load_si512(p);
  __asm__("" : "+v"(v));
  return v;
}

// The constants of add_block in registers: behind a reference they would be loaded for every vector.
template <int kKind, int kFold>
struct Unpacker {
  static constexpr int kVectors = 1 << kFold;
  __m512i index, shift[kVectors], first, second, third;
  explicit Unpacker(const UnpackPlan& c)
      : index(c.index),
        first(kKind == kCode ? c.mask : c.table[0]),
        second(kKind == kPair ? c.pair[0] : c.table[1]),
        third(kKind == kPair ? c.pair[1] : c.table[2]) {
    HM_UNROLL
    for (int s = 0; s < kVectors; ++s) shift[s] = c.shift[s];
  }
};

template <int kKind, int kTokens>
HM_INLINE void add_vector(__m512i u2, __m512i u1, __m512i u0, const int8_t* const* x, int64_t at,
                          Sums<kKind, kTokens>& sums) {
  HM_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    constexpr bool often = kKind == kPair || kKind == kWide;
    const int8_t* p = x[t] + at;
    const __m512i h = often ? load_once(p) : _mm512_load_si512(p);
    const __m512i m = often ? load_once(p + 64) : _mm512_load_si512(p + 64);
    const __m512i l = _mm512_load_si512(p + 128);
    __m512i* s = sums.s[t];
    if (kKind == kPair) {
      s[0] = dot(s[0], u1, h);
      s[1] = dot(s[1], u1, m);
      s[2] = dot(s[2], u0, h);
      s[3] = dot(s[3], u0, m);
      s[4] = dot(s[4], u2, l);
    } else if (kKind == kWide) {
      constexpr bool own = kTokens == 1;
      s[0] = dot(s[0], u2, h);
      s[1] = dot(s[1], u1, h);
      s[own ? 3 : 1] = dot(s[own ? 3 : 1], u2, m);
      s[2] = dot(s[2], u0, h);
      s[own ? 4 : 2] = dot(s[own ? 4 : 2], u1, m);
      s[own ? 5 : 2] = dot(s[own ? 5 : 2], u2, l);
    } else {
      s[0] = dot(s[0], u2, h);
      s[1] = dot(s[1], u2, m);
      s[2] = dot(s[2], u2, l);
    }
  }
}

// Adds the products of the block of codes at p with x at byte `at`.
template <int kKind, int kTokens, int kFold>
HM_INLINE void add_block(const Unpacker<kKind, kFold>& c, const uint8_t* p, __mmask64 bytes,
                         const int8_t* const* x, int64_t at, Sums<kKind, kTokens>& sums) {
  const __m512i codes = _mm512_permutexvar_epi8(c.index, _mm512_maskz_loadu_epi8(bytes, p));
  HM_UNROLL
  for (int s = 0; s < 1 << kFold; ++s) {
    const __m512i v = _mm512_multishift_epi64_epi8(c.shift[s], codes);
    const __m512i u = kKind == kCode ? _mm512_and_si512(v, c.first) : _mm512_permutexvar_epi8(v, c.first);
    __m512i u1 = u, u0 = u;
    if (kKind == kWide) {
      u1 = _mm512_permutexvar_epi8(v, c.second);
      u0 = _mm512_permutexvar_epi8(v, c.third);
    } else if (kKind == kPair) {
      u1 = _mm512_and_si512(v, c.second);
      u0 = _mm512_and_si512(v, c.third);
    }
    add_vector<kKind, kTokens>(u, u1, u0, x, at + 192 * s, sums);
  }
}

// A row's float sums of one token.
struct RowSums {
  __m512 high, low, shift;
};

template <int kKind, int kTokens>
HM_INLINE void flush(const UnpackPlan& c, const Sums<kKind, kTokens>& sums, __m512 scale,
                     RowSums (&row)[kTokens]) {
  HM_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    const __m512i* s = sums.s[t];
    __m512 high, low;
    if (kKind == kPair) {
      __m512 a = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(s[0], 8), s[1]));
      __m512 b = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(s[2], 8), s[3]));
      high = fma(b, splat(c.pair_b), mul(a, splat(c.pair_a)));
      low = _mm512_cvtepi32_ps(s[4]);
    } else {
      __m512i mid = s[1], last = s[2];
      if (kKind == kWide && kTokens == 1) {
        mid = _mm512_add_epi32(mid, s[kChains<kKind, kTokens> - 3]);
        last = _mm512_add_epi32(_mm512_add_epi32(last, s[kChains<kKind, kTokens> - 2]),
                                s[kChains<kKind, kTokens> - 1]);
      }
      high = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(s[0], 8), mid));
      low = _mm512_cvtepi32_ps(last);
    }
    row[t].high = fma(high, scale, row[t].high);
    row[t].low = fma(low, scale, row[t].low);
  }
}

// Scales (or biases) [first, first + n) of a row, n <= 16, zeros behind them.
inline __m512 load_scales(const uint8_t* row, int64_t first, int n, int type) {
  __mmask16 live = __mmask16((1u << n) - 1);
  if (type == hm_f32) return _mm512_maskz_loadu_ps(live, row + 4 * first);
  if (type == hm_e8m0) {
    __m512i e = _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(live, row + first)), 23);
    return _mm512_castsi512_ps(
        _mm512_maskz_max_epi32(live, e, _mm512_set1_epi32(0x00400000)));  // byte 0: 2^-127
  }
  __m256i h = _mm256_maskz_loadu_epi16(live, row + 2 * first);
  if (type == hm_f16) return _mm512_cvtph_ps(h);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

// Where a block cuts groups, or scales lie among the codes: 16 of them, one by one.
__attribute__((noinline)) __m512 gather_scales(const QmatmulTask& task, const UnpackPlan& c,
                                               const uint8_t* row, int64_t first, int n) {
  alignas(64) float s[16] = {};
  for (int i = 0; i < n; ++i)
    s[i] = task.table == hm_e2m1_gguf
               ? e8m0_to_f32(row[(first + i) * 17])
               : _mm512_cvtss_f32(load_scales(row, (first + i) / c.units_per_group, 1, task.scale_type));
  return _mm512_load_ps(s);
}

// Scales (or biases) of units [first, first + n), n <= 16.
inline __m512 load_unit_scales(const QmatmulTask& task, const UnpackPlan& c, const uint8_t* row,
                               int64_t first, int n) {
  return c.gathers_scales ? gather_scales(task, c, row, first, n)
                          : load_scales(row, first, n, task.scale_type);
}

}  // namespace
}  // namespace hm
