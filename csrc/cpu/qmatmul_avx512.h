// Quantized rows times tokens on AVX-512 with VBMI and VNNI. One row of codes, one token:
//
//   y = unit * ( sum_g scale[g] * D[g]  +  sum_g shift[g] * X[g] ),    D[g] = sum_k u[k] * x[k]  (integers)
//
// x is 24-bit fixed point, x = 65536 h + 256 m + l with signed bytes h, m, l (qmatmul_prepare). u is the code
// itself, or a table's entry above the table's smallest one, so it is unsigned; what that leaves out is
// linear in X[g], the sum of x over the group. vpdpbusd adds 4 products u8*s8 into each of 16 int32 lanes:
// nothing is rounded inside a group.
//
// Codes are unpacked in blocks: one load of at most 64 bytes gives 1, 2 or 4 vectors of 64 codes (fold 0, 1,
// 2: 5 to 8 bits, 3 and 4 bits, 2 bits). vpermb brings the bytes of a lane's 4 codes into it, vpmultishiftqb
// takes 8 bits at every code's first bit; bits above the code are masked off, or ignored by a 64-entry table
// that repeats itself. So the width is data, not code. Lane i of vector s holds codes 4 * (i << fold) + 4 s
// + (0..3) of the block, so that a lane sees one group only and a block needs its scales once:
//
//   fold 2, groups of 64:   lane 0..3 | 4..7 | 8..11 | 12..15   x   vector 0..3
//                           group 0   | 1    | 2     | 3            4 codes each
//
// Tokens are stored in the same order, [padded / 64][h m l][64], once per fold in use.
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

// One row whose blocks hold several scales each, or exactly one: every lane has its own.
template <int kKind, int kTokens, int kFold>
void split_row(const QmatmulTask& task, const UnpackPlan& c, const RowScales& r, const int8_t* const* x,
               const float* const* sums, RowSums* out, __m512& largest) {
  const Unpacker<kKind, kFold> unpacker(c);
  RowSums row[kTokens];  // not `out` itself: it would be stored after every block
  HM_UNROLL
  for (int t = 0; t < kTokens; ++t) row[t] = {zero(), zero(), zero()};
  __m512 top = zero();
  const uint8_t* p = r.codes;
  const uint8_t* scale = task.table == hm_e2m1_gguf ? r.codes : r.scale;
  constexpr int64_t width = 64 << kFold;
  const __m512i step = _mm512_set1_epi32(c.units_per_block);
  const __mmask64 bytes = c.whole;
  const int64_t stride = c.stride;
  int64_t block = 0, at = 0;
  Sums<kKind, kTokens> s;
  for (int64_t first = 0; first < c.units; first += 16) {
    const int count = int(c.units - first < 16 ? c.units - first : 16);
    __m512 sv = load_block_scales(task, scale, first, count, c.units_per_group);
    top = _mm512_max_ps(top, _mm512_abs_ps(sv));
    sv = mul(sv, splat(r.norm));
    if (c.offset != 0) {
      __m512 shift =
          r.bias ? mul(load_block_scales(task, r.bias, first, count, c.units_per_group), splat(r.norm)) : sv;
      HM_UNROLL
      for (int t = 0; t < kTokens; ++t) row[t].shift = fma(shift, load(sums[t] + first), row[t].shift);
    }
    __m512i which = c.unit_of_lane;
    const int64_t end = ((first + count) * c.unit + width - 1) / width;
    auto next = [&](__mmask64 bytes) __attribute__((always_inline)) {
      s.clear();
      _mm_prefetch(reinterpret_cast<const char*>(p + kAhead), _MM_HINT_T1);
      add_block<kKind, kTokens, kFold>(unpacker, p, bytes, x, at, s);
      flush<kKind, kTokens>(c, s, _mm512_permutexvar_ps(which, sv), row);
      which = _mm512_add_epi32(which, step);
      p += stride;
      at += 3 * width;
    };
    const int64_t whole = end < c.blocks ? end : c.blocks;
    for (; block < whole; ++block) next(bytes);
    if (block < end) next(c.tail), ++block;
  }
  HM_UNROLL
  for (int t = 0; t < kTokens; ++t) out[t] = row[t];
  largest = top;
}

// One row whose groups are several whole blocks.
template <int kKind, int kTokens, int kFold>
void run_row(const QmatmulTask& task, const UnpackPlan& c, const RowScales& r, const int8_t* const* x,
             const float* const* sums, RowSums* out, __m512& largest) {
  const Unpacker<kKind, kFold> unpacker(c);
  RowSums row[kTokens];
  HM_UNROLL
  for (int t = 0; t < kTokens; ++t) row[t] = {zero(), zero(), zero()};
  __m512 top = zero();
  const uint8_t* p = r.codes;
  constexpr int64_t width = 64 << kFold;
  const int64_t groups = c.units, run = task.group / width;
  int64_t at = 0;
  Sums<kKind, kTokens> s;
  for (int64_t first = 0; first < groups; first += 16) {
    const int count = int(groups - first < 16 ? groups - first : 16);
    __m512 sv = load_scales(r.scale, first, count, task.scale_type);
    top = _mm512_max_ps(top, _mm512_abs_ps(sv));
    sv = mul(sv, splat(r.norm));
    if (c.offset != 0) {
      __m512 shift = r.bias ? mul(load_scales(r.bias, first, count, task.scale_type), splat(r.norm)) : sv;
      HM_UNROLL
      for (int t = 0; t < kTokens; ++t) row[t].shift = fma(shift, load(sums[t] + first), row[t].shift);
    }
    for (int j = 0; j < count; ++j) {
      const __m512 one = _mm512_permutexvar_ps(_mm512_set1_epi32(j), sv);
      for (int64_t left = run; left > 0; left -= kRunVectors >> kFold) {
        s.clear();
        for (int64_t i = left < kRunVectors >> kFold ? left : kRunVectors >> kFold; i > 0; --i) {
          _mm_prefetch(reinterpret_cast<const char*>(p + kAhead), _MM_HINT_T1);
          add_block<kKind, kTokens, kFold>(unpacker, p, c.whole, x, at, s);
          p += c.stride;
          at += 3 * width;
        }
        flush<kKind, kTokens>(c, s, one, row);
      }
    }
  }
  HM_UNROLL
  for (int t = 0; t < kTokens; ++t) out[t] = row[t];
  largest = top;
}

// One row under one scale, which the caller applies. Two sets of sums for one token: see kChains.
template <int kKind, int kTokens, int kFold>
void whole_row(const UnpackPlan& c, const uint8_t* p, const int8_t* const* x, RowSums* out) {
  constexpr int kSets = kTokens == 1 ? 2 : 1;
  constexpr int64_t kWidth = 64 << kFold;
  const Unpacker<kKind, kFold> unpacker(c);
  RowSums row[kTokens];
  HM_UNROLL
  for (int t = 0; t < kTokens; ++t) row[t] = {zero(), zero(), zero()};
  int64_t left = c.blocks, at = 0;
  bool tail = c.has_tail;
  auto next = [&](__mmask64 bytes, Sums<kKind, kTokens>& s) __attribute__((always_inline)) {
    _mm_prefetch(reinterpret_cast<const char*>(p + kAhead), _MM_HINT_T1);
    add_block<kKind, kTokens, kFold>(unpacker, p, bytes, x, at, s);
    p += c.stride;
    at += 3 * kWidth;
  };
  while (left > 0 || tail) {
    Sums<kKind, kTokens> s[kSets];
    HM_UNROLL
    for (int i = 0; i < kSets; ++i) s[i].clear();
    const int64_t blocks = left < kRunVectors >> kFold ? left : kRunVectors >> kFold;
    for (int64_t i = 0; i + 2 <= blocks; i += 2) {
      next(c.whole, s[0]);
      next(c.whole, s[kSets - 1]);
    }
    left -= blocks;
    if (blocks & 1) {
      next(c.whole, s[0]);
    } else if (tail && left == 0 && blocks < kRunVectors >> kFold) {
      next(c.tail, s[0]);
      tail = false;
    }
    if (kSets == 2) HM_UNROLL
    for (int k = 0; k < kChains<kKind, kTokens>; ++k)
      s[0].s[0][k] = _mm512_add_epi32(s[0].s[0][k], s[1].s[0][k]);
    flush<kKind, kTokens>(c, s[0], splat(1.0f), row);
  }
  HM_UNROLL
  for (int t = 0; t < kTokens; ++t) out[t] = row[t];
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

template <int kKind, int kTokens, int kFold>
void one_row(const QmatmulTask& task, const UnpackPlan& c, const RowScales& r, const int8_t* const* x,
             const float* const* sums, RowSums* row, __m512& largest) {
  constexpr int64_t kWidth = 64 << kFold;
  if (task.group == task.columns && task.table != hm_e2m1_gguf)
    return whole_row<kKind, kTokens, kFold>(c, r.codes, x, row);
  if (task.group > kWidth && task.group % kWidth == 0)
    return run_row<kKind, kTokens, kFold>(task, c, r, x, sums, row, largest);
  split_row<kKind, kTokens, kFold>(task, c, r, x, sums, row, largest);
}

// Sums reach 2^40: where a row's scales lie near an end of f32 (E8M0 spans 2^-127 to 2^127) they must
// move to the middle first. `largest` has the largest of them, in 16 lanes.
inline bool extreme(__m512 largest) {
  return _mm512_cmp_ps_mask(largest, splat(0x1p60f), _CMP_GT_OQ) ||
         _mm512_cmp_ps_mask(largest, splat(0x1p-60f), _CMP_LT_OQ) == 0xffff;
}

// Rows [begin, begin + count), count <= 16, for tokens [first, first + kTokens).
template <int kKind, int kTokens, int kFold>
void sixteen_rows(const QmatmulTask& task, const UnpackPlan& c, int64_t begin, int count, int64_t first) {
  const int8_t* x[kTokens];
  const float* sums[kTokens];
  HM_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    x[t] = task.tokens[first + t]->planes[kFold];
    sums[t] = task.tokens[first + t]->sums + task.sums_offset;
  }
  const bool whole = task.group == task.columns && task.table != hm_e2m1_gguf;
  __m512 lanes[kTokens][16];
  alignas(64) double factor[16] = {}, bias[16] = {};
  for (int i = 0; i < 16; ++i) {
    if (i >= count) {
      HM_UNROLL
      for (int t = 0; t < kTokens; ++t) lanes[t][i] = zero();
      continue;
    }
    int64_t n = begin + i;
    RowScales r{task.codes + n * task.row_bytes, task.scale ? task.scale + n * task.scale_stride : nullptr,
                task.bias ? task.bias + n * task.scale_stride : nullptr, 1.0f};
    RowSums row[kTokens];
    __m512 largest = zero();
    one_row<kKind, kTokens, kFold>(task, c, r, x, sums, row, largest);
    factor[i] = 1;
    if (whole) {
      factor[i] = double(_mm512_cvtss_f32(load_scales(r.scale, 0, 1, task.scale_type)));
      if (r.bias) bias[i] = double(_mm512_cvtss_f32(load_scales(r.bias, 0, 1, task.scale_type)));
    } else if (extreme(largest)) {
      const bool large = max_of(largest) > 1;
      r.norm = large ? 0x1p-64f : 0x1p64f;
      one_row<kKind, kTokens, kFold>(task, c, r, x, sums, row, largest);
      factor[i] = large ? 0x1p64 : 0x1p-64;
    }
    HM_UNROLL
    for (int t = 0; t < kTokens; ++t)
      lanes[t][i] =
          fma(row[t].shift, splat(c.offset), fma(row[t].low, splat(c.low), mul(row[t].high, splat(c.high))));
  }
  HM_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    const QmatmulInput& in = *task.tokens[first + t];
    alignas(64) float y[16];
    _mm512_store_ps(y, sum16(lanes[t]));
    for (int i = 0; i < 16; ++i) {
      double v = double(y[i]);
      if (whole)
        v = (v + (task.bias ? 0.0 : double(c.offset)) * in.total) * factor[i] + bias[i] * in.total;
      else
        v *= factor[i];
      y[i] = float(v * in.unit);
    }
    narrow(y, task.out[first + t] + begin * (task.out_type == hm_f32 ? 4 : 2), count, Dtype(task.out_type));
  }
}

template <int kKind, int kFold>
void quantized_rows(const QmatmulTask& task, const UnpackPlan& c, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += 16) {
    const int count = int(end - n < 16 ? end - n : 16);
    int64_t t = 0;
    if constexpr (kKind != kPair)  // 4 tokens times 5 sums do not fit the registers
      for (; t + 4 <= task.token_count; t += 4) sixteen_rows<kKind, 4, kFold>(task, c, n, count, t);
    for (; t + 2 <= task.token_count; t += 2) sixteen_rows<kKind, 2, kFold>(task, c, n, count, t);
    for (; t < task.token_count; ++t) sixteen_rows<kKind, 1, kFold>(task, c, n, count, t);
  }
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
