// Quantized rows times tokens on AVX-512 with VBMI and VNNI. One row of codes, one token:
//
//   y = unit * ( sum_g scale[g] * D[g]  +  sum_g shift[g] * X[g] ),    D[g] = sum_k u[k] * x[k]  (integers)
//
// x is 24-bit fixed point, x = 65536 h + 256 m + l with signed bytes h, m, l (qmatmul_prepare). u is the code
// itself, or a table's entry above the table's smallest one, so it is unsigned; what that leaves out is
// linear in X[g], the sum of x over the group. vpdpbusd adds 4 products u8*s8 into each of 16 int32 lanes:
// nothing is rounded inside a group.
//
// Codes are unpacked in blocks: one load of at most 64 bytes gives U = 1, 2 or 4 vectors of 64 codes (5 to 8
// bits; 3 and 4; 2). vpermb brings the bytes of a lane's 4 U codes into it, once; for each vector
// vpmultishiftqb takes 8 bits at the first bit of every U-th code. Bits above the code are masked off, or
// ignored by a 64-entry table that repeats itself. So the width is data, not code. Byte i of vector s is
// code U * i + s of the block: a lane sees one group only, and a block joins its scales once:
//
//   U = 4, groups of 64:   lane 0..3 | 4..7 | 8..11 | 12..15   x   vector 0..3
//                          group 0   | 1    | 2     | 3            4 codes each
//
// Tokens are stored in the same order, [padded / 64][h m l][64], once per U in use.
//
// One core must turn ~25 GB/s of codes into products: for 2 bits that is 64 codes in 3 cycles. Bytes per
// 64 codes: 8*bits of codes from memory, 192 of x from L1. A call owns rows [begin, end) for every token
// of the task; 16 rows are reduced together.
#pragma once
#include "qmatmul_avx512_block.h"

namespace hm {
namespace {

constexpr int kRunVectors = 32;   // int32 lanes hold 32 * 4 * 255 * 128 << 8
constexpr int64_t kAhead = 4096;  // prefetch distance, bytes

// What a row needs besides its codes.
struct RowScales {
  const uint8_t *codes, *scale, *bias;
  float norm;  // power of two that keeps scale * sum inside f32
};

// Scales of up to 16 units from `first` on, and their part of the result that is linear in the sums of x.
template <int kTokens>
HM_INLINE __m512 next_scales(const QmatmulTask& task, const UnpackPlan& c, const RowScales& r, int64_t first,
                             int count, const float* const* sums, RowSums (&row)[kTokens], __m512& top) {
  __m512 scale = load_unit_scales(task, c, r.scale, first, count);
  top = _mm512_max_ps(top, _mm512_abs_ps(scale));
  scale = mul(scale, splat(r.norm));
  if (c.offset == 0) return scale;
  const __m512 shift = r.bias ? mul(load_unit_scales(task, c, r.bias, first, count), splat(r.norm)) : scale;
  HM_UNROLL
  for (int t = 0; t < kTokens; ++t) row[t].shift = fma(shift, load(sums[t] + first), row[t].shift);
  return scale;
}

// One row whose blocks hold several scales each, or exactly one: every lane has its own.
template <int kKind, int kTokens, int kFold>
HM_INLINE void split_row(const QmatmulTask& task, const UnpackPlan& c, const Unpacker<kKind, kFold>& unpacker,
                         const RowScales& r, const int8_t* const* x, const float* const* sums,
                         RowSums (&row)[kTokens], __m512& top) {
  constexpr int64_t kWidth = 64 << kFold;
  const __m512i step = _mm512_set1_epi32(c.units_per_block);
  const __mmask64 bytes = c.whole;
  const int64_t stride = c.stride;
  const uint8_t* p = r.codes;
  int64_t block = 0, at = 0;
  Sums<kKind, kTokens> s;
  for (int64_t first = 0; first < c.units; first += 16) {
    const int count = int(c.units - first < 16 ? c.units - first : 16);
    const __m512 scale = next_scales<kTokens>(task, c, r, first, count, sums, row, top);
    __m512i which = c.unit_of_lane;
    auto next = [&](__mmask64 live) __attribute__((always_inline)) {
      s.clear();
      _mm_prefetch(reinterpret_cast<const char*>(p + kAhead), _MM_HINT_T1);
      add_block<kKind, kTokens, kFold>(unpacker, p, live, x, at, s);
      flush<kKind, kTokens>(c, s, _mm512_permutexvar_ps(which, scale), row);
      which = _mm512_add_epi32(which, step);
      p += stride;
      at += 3 * kWidth;
    };
    const int64_t end = ((first + count) * c.unit + kWidth - 1) / kWidth;
    const int64_t whole = end < c.blocks ? end : c.blocks;
    for (; block < whole; ++block) next(bytes);
    if (block < end) next(c.tail), ++block;
  }
}

// One row whose groups are several whole blocks.
template <int kKind, int kTokens, int kFold>
HM_INLINE void run_row(const QmatmulTask& task, const UnpackPlan& c, const Unpacker<kKind, kFold>& unpacker,
                       const RowScales& r, const int8_t* const* x, const float* const* sums,
                       RowSums (&row)[kTokens], __m512& top) {
  constexpr int64_t kMost = kRunVectors >> kFold;
  const uint8_t* p = r.codes;
  int64_t at = 0;
  Sums<kKind, kTokens> s;
  for (int64_t first = 0; first < c.units; first += 16) {
    const int count = int(c.units - first < 16 ? c.units - first : 16);
    const __m512 scale = next_scales<kTokens>(task, c, r, first, count, sums, row, top);
    for (int j = 0; j < count; ++j) {
      const __m512 one = _mm512_permutexvar_ps(_mm512_set1_epi32(j), scale);
      for (int64_t left = c.blocks_per_unit; left > 0; left -= kMost) {
        s.clear();
        for (int64_t i = left < kMost ? left : kMost; i > 0; --i) {
          _mm_prefetch(reinterpret_cast<const char*>(p + kAhead), _MM_HINT_T1);
          add_block<kKind, kTokens, kFold>(unpacker, p, c.whole, x, at, s);
          p += c.stride;
          at += 192 << kFold;
        }
        flush<kKind, kTokens>(c, s, one, row);
      }
    }
  }
}

// One row under one scale, which the caller applies. Two sets of sums for one token: see kChains.
template <int kKind, int kTokens, int kFold>
HM_INLINE void whole_row(const UnpackPlan& c, const Unpacker<kKind, kFold>& unpacker, const uint8_t* p,
                         const int8_t* const* x, RowSums (&row)[kTokens]) {
  constexpr int kSets = kTokens == 1 ? 2 : 1;
  constexpr int64_t kMost = kRunVectors >> kFold;
  const __mmask64 bytes = c.whole;
  const int64_t stride = c.stride;
  int64_t left = c.blocks, at = 0;
  bool tail = c.has_tail;
  auto next = [&](__mmask64 live, Sums<kKind, kTokens>& s) __attribute__((always_inline)) {
    _mm_prefetch(reinterpret_cast<const char*>(p + kAhead), _MM_HINT_T1);
    add_block<kKind, kTokens, kFold>(unpacker, p, live, x, at, s);
    p += stride;
    at += 192 << kFold;
  };
  while (left > 0 || tail) {
    Sums<kKind, kTokens> s[kSets];
    HM_UNROLL
    for (int i = 0; i < kSets; ++i) s[i].clear();
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
      for (int k = 0; k < kChains<kKind, kTokens>; ++k)
        s[0].s[0][k] = _mm512_add_epi32(s[0].s[0][k], s[1].s[0][k]);
    }
    flush<kKind, kTokens>(c, s[0], splat(1.0f), row);
  }
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

// Sums reach 2^40: where a row's scales lie near an end of f32 (E8M0 spans 2^-127 to 2^127) they must
// move to the middle first. `largest` has the largest of them, in 16 lanes.
inline bool extreme(__m512 largest) {
  return _mm512_cmp_ps_mask(largest, splat(0x1p60f), _CMP_GT_OQ) ||
         _mm512_cmp_ps_mask(largest, splat(0x1p-60f), _CMP_LT_OQ) == 0xffff;
}

// y[i] = (sum[i] + offset * total) * factor[i] + bias[i] * total, in units of x; f64 because a unit may be
// 2^-172. Only rows under one scale have an offset or a bias here.
inline void finish(const QmatmulTask& task, const QmatmulInput& in, __m512 sum, __m512 factor, __m512 bias,
                   double offset, char* out, int count) {
  const __m512d total = _mm512_set1_pd(in.total), unit = _mm512_set1_pd(in.unit);
  __m256 half[2];
  for (int i = 0; i < 2; ++i) {
    auto wide = [&](__m512 v) {
      return _mm512_cvtps_pd(i ? _mm512_extractf32x8_ps(v, 1) : _mm512_castps512_ps256(v));
    };
    __m512d v = _mm512_add_pd(wide(sum), _mm512_mul_pd(total, _mm512_set1_pd(offset)));
    v = _mm512_add_pd(_mm512_mul_pd(v, wide(factor)), _mm512_mul_pd(wide(bias), total));
    half[i] = _mm512_cvtpd_ps(_mm512_mul_pd(v, unit));
  }
  const __m512 y = _mm512_insertf32x8(_mm512_castps256_ps512(half[0]), half[1], 1);
  if (task.out_type == hm_f32) {
    _mm512_mask_storeu_ps(out, __mmask16((1u << count) - 1), y);
    return;
  }
  alignas(64) float f[16];
  _mm512_store_ps(f, y);
  narrow(f, out, count, Dtype(task.out_type));
}

enum RowKind { kSplit, kRun, kWhole };

// Rows [begin, begin + count), count <= 16, for tokens [first, first + kTokens).
template <int kKind, int kTokens, int kFold, int kRow>
void sixteen_rows(const QmatmulTask& task, const UnpackPlan& c, int64_t begin, int count, int64_t first) {
  const Unpacker<kKind, kFold> unpacker(c);
  const int8_t* x[kTokens];
  const float* sums[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    x[t] = task.tokens[first + t]->planes[kFold];
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
      for (int t = 0; t < kTokens; ++t) row[t] = {zero(), zero(), zero()};
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
      const __m512 high = mul(row[t].high, splat(c.high));
      lanes[t][i] = fma(row[t].low, splat(c.low), high);
      if (kRow != kWhole) lanes[t][i] = fma(row[t].shift, splat(c.offset), lanes[t][i]);
    }
  }
  __m512 scale = _mm512_load_ps(factor), bias = zero();
  if (kRow == kWhole) {
    scale = load_scales(task.scale, begin, count, task.scale_type);
    if (task.bias) bias = load_scales(task.bias, begin, count, task.scale_type);
  }
  const double offset = kRow == kWhole && !task.bias ? double(c.offset) : 0;
  const int64_t item = task.out_type == hm_f32 ? 4 : 2;
  for (int t = 0; t < kTokens; ++t)
    finish(task, *task.tokens[first + t], sum16(lanes[t]), scale, bias, offset,
           task.out[first + t] + begin * item, count);
}

template <int kKind, int kFold, int kRow>
void rows_of(const QmatmulTask& task, const UnpackPlan& c, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += 16) {
    const int count = int(end - n < 16 ? end - n : 16);
    int64_t t = 0;
    if constexpr (kKind != kPair)  // 4 tokens times 5 sums do not fit the registers
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
  UnpackPlan c;
  const UnpackKind kind = plan_unpack(task, c);
  const int fold = qmatmul_fold(task.table, task.bits);
  if (kind == kPair) return quantized_rows<kPair, 2>(task, c, begin, end);
  if (kind == kWide && fold == 2) return quantized_rows<kWide, 2>(task, c, begin, end);
  if (kind == kWide) return quantized_rows<kWide, 1>(task, c, begin, end);
  if (kind == kTable && fold == 2) return quantized_rows<kTable, 2>(task, c, begin, end);
  if (kind == kTable && fold == 1) return quantized_rows<kTable, 1>(task, c, begin, end);
  if (kind == kTable) return quantized_rows<kTable, 0>(task, c, begin, end);
  if (fold == 2) return quantized_rows<kCode, 2>(task, c, begin, end);
  if (fold == 1) return quantized_rows<kCode, 1>(task, c, begin, end);
  quantized_rows<kCode, 0>(task, c, begin, end);
}

}  // namespace
}  // namespace hm
