// Quantized rows times tokens on AVX-512 with VBMI and VNNI. One row of codes, one token:
//
//   y = unit * sum_g ( scale[g] * ( D[g] + offset * X[g] ) + shift[g] * X[g] ),    D[g] = sum_k u[k] * x[k]
//
// x is 32-bit fixed point under one power of two per token, x = 2^24 h + 2^16 m + 2^8 l + k with signed bytes
// h, m, l, k (qmatmul_avx512_prepare.h): off by at most 2^-31 of the token's largest. Fewer bits would do for
// even tokens, but real ones have columns 10 to 100 times the rest. u is the code itself, or twice an E2M1
// number above the smallest one, so it is unsigned, and vpdpbusd adds 4 products u8*s8 into each of 16 int32
// lanes: D is exact. X[g] is the sum of x over the group. The offset is -2^(bits-1) (E2M1: its smallest), so
// that what is left of the bias, shift = bias - scale * offset, is small where numbers lie about zero: a
// difference of two large terms would keep the roundings of both. It is taken off lane by lane. Codebooks
// have entries no byte holds: qmatmul_avx512_codebook.h.
//
// Codes are unpacked in blocks: one load of at most 64 bytes gives U = 1, 2 or 4 vectors of 64 codes (5 to 8
// bits; 3 and 4; 2). Codes of 2, 4 and 8 bits fill bytes and need shifts or nothing. For 3, 5 and 6 vpermb
// brings the bytes of a lane's 4 U codes into it, once; for each vector vpmultishiftqb takes 8 bits at the
// first bit of every U-th code. Bits above the code are masked off, or ignored by a 64-entry table that
// repeats itself. Byte i of vector s is code U * i + s of the block: a lane sees one group only, and a block
// joins its scales once:
//
//   U = 4, groups of 64:   lane 0..3 | 4..7 | 8..11 | 12..15   x   vector 0..3
//                          group 0   | 1    | 2     | 3            4 codes each
//
// Tokens are stored in the same order, [padded / 64][h m l k][64], once for each U in use.
//
// One core must turn ~25 GB/s of codes into products: for 2 bits that is 64 codes in 3 cycles. Bytes per
// 64 codes: 8*bits of codes from memory, 256 of x from L1. A call owns rows [begin, end) for every token
// of the task; 16 rows are reduced together.
#pragma once
#include "qmatmul_avx512_codebook.h"

namespace hm {
namespace {

constexpr int kRunVectors = 32;  // int32 lanes hold 32 * 4 * 255 * 128 << 8

// What a row needs besides its codes.
struct RowScales {
  const uint8_t *codes, *scale, *bias;
  float norm;  // power of two that keeps scale * sum inside f32
};

// Scales of up to 16 units from `first` on; their shifts times the sums of x are added to row.
template <int kTokens>
HM_INLINE __m512 next_scales(const QmatmulTask& task, const UnpackPlan& c, const RowScales& r, int64_t first,
                             int count, const float* const* sums, RowSums (&row)[kTokens], __m512& top) {
  __m512 scale = load_unit_scales(task, c, r.scale, first, count);
  top = _mm512_max_ps(top, _mm512_abs_ps(scale));
  scale = mul(scale, splat(r.norm));
  if (!c.has_shift) return scale;
  const __m512 bias = r.bias ? load_unit_scales(task, c, r.bias, first, count) : zero();
  const __m512 shift = fma(scale, splat(-c.offset), mul(bias, splat(r.norm)));
  HM_UNROLL
  for (int t = 0; t < kTokens; ++t) row[t].shift = fma(shift, load(sums[t] + first), row[t].shift);
  return scale;
}

// One row whose blocks hold several scales each, or exactly one: every lane has its own.
template <int kKind, int kTokens, int kFold>
HM_INLINE void split_row(const QmatmulTask& task, const UnpackPlan& c, const Unpacker<kFold>& unpacker,
                         const RowScales& r, const Planes* x, const float* const* sums,
                         RowSums (&row)[kTokens], __m512& top) {
  constexpr int64_t kWidth = 64 << kFold;
  const __m512i step = _mm512_set1_epi32(c.units_per_block);
  const __mmask64 bytes = c.whole;
  const int64_t stride = c.stride;
  const uint8_t* p = r.codes;
  int64_t block = 0, at = 0;
  const __m512 offset = splat(c.offset);
  for (int64_t first = 0; first < c.units; first += 16) {
    const int count = int(c.units - first < 16 ? c.units - first : 16);
    const __m512 scale = next_scales<kTokens>(task, c, r, first, count, sums, row, top);
    __m512i which = c.unit_of_lane;
    auto next = [&](__mmask64 live) __attribute__((always_inline)) {
      _mm_prefetch(reinterpret_cast<const char*>(p + kAhead), _MM_HINT_T1);
      add_scaled_block<kKind, kTokens, kFold>(unpacker, p, live, x, at, offset,
                                              _mm512_permutexvar_ps(which, scale), row);
      which = _mm512_add_epi32(which, step);
      p += stride;
      at += 4 * kWidth;
    };
    const int64_t end = ((first + count) * c.unit + kWidth - 1) / kWidth;
    const int64_t whole = end < c.blocks ? end : c.blocks;
    for (; block < whole; ++block) next(bytes);
    if (block < end) next(c.tail), ++block;
  }
}

// One row whose groups are several whole blocks.
template <int kKind, int kTokens, int kFold>
HM_INLINE void run_row(const QmatmulTask& task, const UnpackPlan& c, const Unpacker<kFold>& unpacker,
                       const RowScales& r, const Planes* x, const float* const* sums,
                       RowSums (&row)[kTokens], __m512& top) {
  constexpr int64_t kMost = kRunVectors >> kFold;
  const uint8_t* p = r.codes;
  int64_t at = 0;
  const __m512 offset = splat(c.offset);
  Sums<kTokens> s;
  for (int64_t first = 0; first < c.units; first += 16) {
    const int count = int(c.units - first < 16 ? c.units - first : 16);
    const __m512 scale = next_scales<kTokens>(task, c, r, first, count, sums, row, top);
    for (int j = 0; j < count; ++j) {
      const __m512 one = _mm512_permutexvar_ps(_mm512_set1_epi32(j), scale);
      for (int64_t left = c.blocks_per_unit; left > 0; left -= kMost) {
        s.clear();
        __m512 lanes[kTokens] = {};
        for (int64_t i = left < kMost ? left : kMost; i > 0; --i) {
          _mm_prefetch(reinterpret_cast<const char*>(p + kAhead), _MM_HINT_T1);
          add_block<kKind, kTokens, kFold>(unpacker, p, c.whole, x, at, s, lanes);
          p += c.stride;
          at += 256 << kFold;
        }
        flush<kTokens>(s, lanes, offset, one, row);
      }
    }
  }
}

// One row under one scale, which the caller applies. Two sets of sums for one token: see kChains.
template <int kKind, int kTokens, int kFold>
HM_INLINE void whole_row(const UnpackPlan& c, const Unpacker<kFold>& unpacker, const uint8_t* p,
                         const Planes* x, RowSums (&row)[kTokens]) {
  constexpr int kSets = kTokens == 1 ? 2 : 1;
  constexpr int64_t kMost = kRunVectors >> kFold;
  const __mmask64 bytes = c.whole;
  const int64_t stride = c.stride;
  int64_t left = c.blocks, at = 0;
  const __m512 offset = splat(c.offset);
  bool tail = c.has_tail;
  __m512 lanes[kTokens];  // one order of additions whatever the number of sets
  auto next = [&](__mmask64 live, Sums<kTokens>& s) __attribute__((always_inline)) {
    _mm_prefetch(reinterpret_cast<const char*>(p + kAhead), _MM_HINT_T1);
    add_block<kKind, kTokens, kFold>(unpacker, p, live, x, at, s, lanes);
    p += stride;
    at += 256 << kFold;
  };
  while (left > 0 || tail) {
    Sums<kTokens> s[kSets];
    HM_UNROLL
    for (int i = 0; i < kSets; ++i) s[i].clear();
    HM_UNROLL
    for (int t = 0; t < kTokens; ++t) lanes[t] = zero();
    const int64_t blocks = left < kMost ? left : kMost;
    for (int64_t i = 0; i + 2 <= blocks; i += 2) {
      next(bytes, s[0]);
      next(bytes, s[kSets - 1]);
    }
    left -= blocks;
    if (blocks & 1) {
      next(bytes, s[0]);
    } else if (tail && blocks < kMost) {
      next(c.tail, s[0]);
      tail = false;
    }
    if (kSets == 2) {
      HM_UNROLL
      for (int k = 0; k < 4; ++k) s[0].s[0][k] = _mm512_add_epi32(s[0].s[0][k], s[1].s[0][k]);
    }
    flush<kTokens>(s[0], lanes, offset, splat(1.0f), row);
  }
}

// Sums reach 2^48: where a row's scales lie near an end of f32 (E8M0 spans 2^-127 to 2^127) they must
// move to the middle first. `largest` has the largest of them, in 16 lanes.
inline bool extreme(__m512 largest) {
  return _mm512_cmp_ps_mask(largest, splat(0x1p60f), _CMP_GT_OQ) ||
         _mm512_cmp_ps_mask(largest, splat(0x1p-60f), _CMP_LT_OQ) == 0xffff;
}

// y[i] = sum[i] * factor[i] + (bias[i] + centre * factor[i]) * total, in units of x; f64 because a unit may
// be 2^-180. Only rows under one scale have the second term here.
inline void finish(const QmatmulTask& task, const QmatmulInput& in, __m512 sum, __m512 factor, __m512 bias,
                   double centre, char* out, int count) {
  const __m512d total = _mm512_set1_pd(in.total), unit = _mm512_set1_pd(in.unit);
  __m256 half[2];
  for (int i = 0; i < 2; ++i) {
    auto wide = [&](__m512 v) {
      return _mm512_cvtps_pd(i ? _mm512_extractf32x8_ps(v, 1) : _mm512_castps512_ps256(v));
    };
    const __m512d shift = _mm512_add_pd(wide(bias), _mm512_mul_pd(wide(factor), _mm512_set1_pd(centre)));
    const __m512d v = _mm512_add_pd(_mm512_mul_pd(wide(sum), wide(factor)), _mm512_mul_pd(shift, total));
    half[i] = _mm512_cvtpd_ps(_mm512_mul_pd(v, unit));
  }
  const __m512 y = _mm512_insertf32x8(_mm512_castps256_ps512(half[0]), half[1], 1);
  store_rows(task, y, out, count);
}

enum RowKind { kSplit, kRun, kWhole };

// Rows [begin, begin + count), count <= 16, for tokens [first, first + kTokens).
template <int kKind, int kTokens, int kFold, int kRow>
void sixteen_rows(const QmatmulTask& task, const UnpackPlan& c, int64_t begin, int count, int64_t first) {
  const Unpacker<kFold> unpacker(c);
  Planes x[kTokens];
  const float* sums[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    x[t] = {task.tokens[first + t]->planes[kFold], task.tokens[first + t]->lane_sums[kFold]};
    sums[t] = task.tokens[first + t]->sums + task.sums_offset;
  }
  __m512 lanes[kTokens][16];
  alignas(64) float factor[16];
  for (int i = 0; i < 16; ++i) {
    factor[i] = 1;
    if (i >= count)
      for (int t = 0; t < kTokens; ++t) lanes[t][i] = zero();
  }
  const uint8_t* codes = task.codes + begin * task.row_bytes;
  for (int i = 0; i < count; ++i, codes += task.row_bytes) {
    const int64_t side = (begin + i) * task.scale_stride;
    RowScales r{codes, task.scale ? task.scale + side : codes, task.bias ? task.bias + side : nullptr, 1.0f};
    RowSums row[kTokens];
    for (;;) {
      HM_UNROLL
      for (int t = 0; t < kTokens; ++t) row[t] = {zero(), zero()};
      __m512 top = zero();
      if constexpr (kRow == kWhole) whole_row<kKind, kTokens, kFold>(c, unpacker, codes, x, row);
      if constexpr (kRow == kRun) run_row<kKind, kTokens, kFold>(task, c, unpacker, r, x, sums, row, top);
      if constexpr (kRow == kSplit) split_row<kKind, kTokens, kFold>(task, c, unpacker, r, x, sums, row, top);
      if (kRow == kWhole || !extreme(top) || r.norm != 1 || max_of(top) == 0) break;
      r.norm = max_of(top) > 1 ? 0x1p-64f : 0x1p64f;
      factor[i] = 1 / r.norm;
    }
    HM_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      lanes[t][i] = mul(row[t].products, splat(c.unit_of_u));
      if (kRow != kWhole) lanes[t][i] = add(row[t].shift, lanes[t][i]);
    }
  }
  __m512 scale = _mm512_load_ps(factor), bias = zero();
  if (kRow == kWhole) {
    scale = load_scales(task.scale, begin, count, task.scale_type);
    if (task.bias) bias = load_scales(task.bias, begin, count, task.scale_type);
  }
  const double centre = kRow == kWhole && c.has_shift ? -double(c.offset) : 0;
  const int64_t item = task.out_type == hm_f32 ? 4 : 2;
  for (int t = 0; t < kTokens; ++t)
    finish(task, *task.tokens[first + t], sum16(lanes[t]), scale, bias, centre,
           task.out[first + t] + begin * item, count);
}

template <int kKind, int kFold, int kRow>
void rows_of(const QmatmulTask& task, const UnpackPlan& c, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += 16) {
    const int count = int(end - n < 16 ? end - n : 16);
    int64_t t = 0;
    for (; t + 4 <= task.token_count; t += 4) sixteen_rows<kKind, 4, kFold, kRow>(task, c, n, count, t);
    for (; t + 2 <= task.token_count; t += 2) sixteen_rows<kKind, 2, kFold, kRow>(task, c, n, count, t);
    for (; t < task.token_count; ++t) sixteen_rows<kKind, 1, kFold, kRow>(task, c, n, count, t);
  }
}

template <int kKind, int kFold>
void quantized_rows(const QmatmulTask& task, const UnpackPlan& c, int64_t begin, int64_t end) {
  constexpr int64_t kWidth = 64 << kFold;
  if (task.group == task.columns && task.table != hm_e2m1_gguf)
    return rows_of<kKind, kFold, kWhole>(task, c, begin, end);
  if (task.group > kWidth && task.group % kWidth == 0)
    return rows_of<kKind, kFold, kRun>(task, c, begin, end);
  rows_of<kKind, kFold, kSplit>(task, c, begin, end);
}

void qmatmul_quantized(const QmatmulTask& task, int64_t begin, int64_t end) {
  if (task.table == hm_codebook) return qmatmul_codebook(task, begin, end);
  UnpackPlan c;
  const UnpackKind kind = plan_unpack(task, c);
  const int fold = qmatmul_layout(task.table, task.bits);
  if (kind == kShiftedTable) return quantized_rows<kShiftedTable, 1>(task, c, begin, end);
  if (kind == kTable) return quantized_rows<kTable, 0>(task, c, begin, end);
  if (kind == kByte) return quantized_rows<kByte, 0>(task, c, begin, end);
  if (kind == kShiftedCode && fold == 2) return quantized_rows<kShiftedCode, 2>(task, c, begin, end);
  if (kind == kShiftedCode) return quantized_rows<kShiftedCode, 1>(task, c, begin, end);
  if (fold == 1) return quantized_rows<kCode, 1>(task, c, begin, end);
  quantized_rows<kCode, 0>(task, c, begin, end);
}

}  // namespace
}  // namespace hm
