// One block of codes in AVX-512's qmatmul: unpack, multiply, add, and bring integer sums to f32 under their
// scales. The equations and the order of lanes are in qmatmul_avx512.h.
#pragma once
#include "qmatmul_avx512_prepare.h"

namespace hm {
namespace {

#define HM_INLINE inline __attribute__((always_inline))
// Arrays of vectors stay in registers only where every loop over them is unrolled.
#define HM_UNROLL _Pragma("GCC unroll 8")

constexpr int64_t kAhead = 4096;  // prefetch distance, bytes

// Integer sums of tokens, one for each plane of x.
template <int kTokens>
struct Sums {
  __m512i s[kTokens][4];
  inline void clear() {
    HM_UNROLL
    for (int t = 0; t < kTokens; ++t) HM_UNROLL
    for (int i = 0; i < 4; ++i) s[t][i] = _mm512_setzero_si512();
  }
};

// The constants of add_block in registers: behind a reference they would be loaded for every vector.
template <int kFold>
struct Unpacker {
  static constexpr int kVectors = 1 << kFold;
  __m512i index, shift[kVectors], first;
  explicit Unpacker(const UnpackPlan& c) : index(c.index), first(c.first) {
    HM_UNROLL
    for (int s = 0; s < kVectors; ++s) shift[s] = c.shift[s];
  }
};

// The u8 of a block of codes at p, in kFold's order.
template <int kKind, int kFold>
HM_INLINE void unpack(const Unpacker<kFold>& c, const uint8_t* p, __mmask64 bytes, __m512i (&u)[1 << kFold]) {
  __m512i codes = _mm512_maskz_loadu_epi8(bytes, p);
  if (kKind == kByte) {
    u[0] = codes;
    return;
  }
  constexpr bool shifts = kKind != kCode && kKind != kTable;
  if (!shifts) codes = _mm512_permutexvar_epi8(c.index, codes);
  HM_UNROLL
  for (int s = 0; s < 1 << kFold; ++s) {
    const __m512i v = shifts ? _mm512_srli_epi16(codes, unsigned(s * 8 >> kFold))
                             : _mm512_multishift_epi64_epi8(c.shift[s], codes);
    u[s] = kKind != kTable && kKind != kShiftedTable ? _mm512_and_si512(v, c.first)
                                                   : _mm512_permutexvar_epi8(v, c.first);
  }
}

// sum + the products of a block with one plane of x.
template <int kFold>
HM_INLINE __m512i dot(__m512i sum, const __m512i (&u)[1 << kFold], const int8_t* x) {
  HM_UNROLL
  for (int s = 0; s < 1 << kFold; ++s) sum = _mm512_dpbusd_epi32(sum, u[s], _mm512_load_si512(x + 256 * s));
  return sum;
}

// A row's float sums of one token.
struct RowSums {
  __m512 products, shift;
};

// A token as a row of codes of one kind meets it.
struct Planes {
  const int8_t* x;
  const float* lane_sums;
};

HM_INLINE void add_scaled(__m512i high, __m512i low, __m512 lane_sum, __m512 offset, __m512 scale,
                          RowSums& row) {
  __m512 sum = fma(_mm512_cvtepi32_ps(high), splat(65536), _mm512_cvtepi32_ps(low));
  sum = fma(lane_sum, offset, sum);
  row.products = fma(sum, scale, row.products);
}

template <int kTokens>
HM_INLINE void flush(const Sums<kTokens>& sums, const __m512 (&lanes)[kTokens], __m512 offset, __m512 scale,
                     RowSums (&row)[kTokens]) {
  HM_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    const __m512i* s = sums.s[t];
    add_scaled(_mm512_add_epi32(_mm512_slli_epi32(s[0], 8), s[1]),
               _mm512_add_epi32(_mm512_slli_epi32(s[2], 8), s[3]), lanes[t], offset, scale, row[t]);
  }
}

// Adds the products of the block of codes at p with x at byte `at`, and the sums of x to lanes.
template <int kKind, int kTokens, int kFold>
HM_INLINE void add_block(const Unpacker<kFold>& c, const uint8_t* p, __mmask64 bytes, const Planes* x,
                         int64_t at, Sums<kTokens>& sums, __m512 (&lanes)[kTokens]) {
  __m512i u[1 << kFold];
  unpack<kKind, kFold>(c, p, bytes, u);
  HM_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    lanes[t] = add(lanes[t], _mm512_load_ps(x[t].lane_sums + (at >> (4 + kFold))));
    HM_UNROLL
    for (int i = 0; i < 4; ++i) sums.s[t][i] = dot<kFold>(sums.s[t][i], u, x[t].x + at + 64 * i);
  }
}

// The same of one block under its own scales. Planes join on the way, except where 8 dot products in a row
// would wait for each other.
template <int kKind, int kTokens, int kFold>
HM_INLINE void add_scaled_block(const Unpacker<kFold>& c, const uint8_t* p, __mmask64 bytes,
                                const Planes* x, int64_t at, __m512 offset, __m512 scale,
                                RowSums (&row)[kTokens]) {
  __m512i u[1 << kFold];
  unpack<kKind, kFold>(c, p, bytes, u);
  HM_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    __m512i pair[2];
    HM_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int8_t* plane = x[t].x + at + 128 * i;
      const __m512i upper = _mm512_slli_epi32(dot<kFold>(_mm512_setzero_si512(), u, plane), 8);
      pair[i] = kFold == 2 ? _mm512_add_epi32(upper, dot<kFold>(_mm512_setzero_si512(), u, plane + 64))
                           : dot<kFold>(upper, u, plane + 64);
    }
    const __m512 lanes = _mm512_load_ps(x[t].lane_sums + (at >> (4 + kFold)));
    add_scaled(pair[0], pair[1], lanes, offset, scale, row[t]);
  }
}

// E8M0 bytes in 32 bits; byte 0 is 2^-127.
inline __m512 from_e8m0(__m512i bytes, __mmask16 live) {
  const __m512i e = _mm512_slli_epi32(bytes, 23);
  return _mm512_castsi512_ps(_mm512_maskz_max_epi32(live, e, _mm512_set1_epi32(0x00400000)));
}

// Scales (or biases) [first, first + n) of a row, n <= 16, zeros behind them.
inline __m512 load_scales(const uint8_t* row, int64_t first, int n, int type) {
  __mmask16 live = __mmask16((1u << n) - 1);
  if (type == hm_f32) return _mm512_maskz_loadu_ps(live, row + 4 * first);
  if (type == hm_e8m0) return from_e8m0(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(live, row + first)), live);
  __m256i h = _mm256_maskz_loadu_epi16(live, row + 2 * first);
  if (type == hm_f16) return _mm512_cvtph_ps(h);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

// The scales of GGUF blocks, each the first of 17 bytes.
inline __m512 gather_block_scales(const uint8_t* row, int64_t first, int n) {
  const __m512i step = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i at = _mm512_mullo_epi32(_mm512_set1_epi32(17), step);
  const __mmask16 live = __mmask16((1u << n) - 1);
  const __m512i v = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), live, at, row + first * 17, 1);
  return from_e8m0(_mm512_and_si512(v, _mm512_set1_epi32(255)), live);
}

// Where a block cuts groups: 16 scales, one by one.
__attribute__((noinline)) __m512 gather_scales(const QmatmulTask& task, const UnpackPlan& c,
                                               const uint8_t* row, int64_t first, int n) {
  alignas(64) float s[16] = {};
  for (int i = 0; i < n; ++i)
    s[i] = _mm512_cvtss_f32(load_scales(row, (first + i) / c.units_per_group, 1, task.scale_type));
  return _mm512_load_ps(s);
}

// Scales (or biases) of units [first, first + n), n <= 16.
inline __m512 load_unit_scales(const QmatmulTask& task, const UnpackPlan& c, const uint8_t* row,
                               int64_t first, int n) {
  if (task.table == hm_e2m1_gguf) return gather_block_scales(row, first, n);
  return c.gathers_scales ? gather_scales(task, c, row, first, n)
                          : load_scales(row, first, n, task.scale_type);
}

// Sums of 16 vectors, in one fixed order.
inline __m512 sum16(const __m512* a) {
  __m512 b[8], d[4], e[2];
  for (int i = 0; i < 8; ++i)
    b[i] = add(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  for (int i = 0; i < 4; ++i)
    d[i] =
        add(_mm512_shuffle_ps(b[2 * i], b[2 * i + 1], 0x44), _mm512_shuffle_ps(b[2 * i], b[2 * i + 1], 0xEE));
  for (int i = 0; i < 2; ++i)
    e[i] = add(_mm512_shuffle_f32x4(d[2 * i], d[2 * i + 1], 0x88),
               _mm512_shuffle_f32x4(d[2 * i], d[2 * i + 1], 0xDD));
  return add(_mm512_shuffle_f32x4(e[0], e[1], 0x88), _mm512_shuffle_f32x4(e[0], e[1], 0xDD));
}

// y of `count` rows to memory.
inline void store_rows(const QmatmulTask& task, __m512 y, char* out, int count) {
  if (task.out_type == hm_f32) {
    _mm512_mask_storeu_ps(out, __mmask16((1u << count) - 1), y);
    return;
  }
  alignas(64) float f[16];
  _mm512_store_ps(f, y);
  narrow(f, out, count, Dtype(task.out_type));
}

}  // namespace
}  // namespace hm
