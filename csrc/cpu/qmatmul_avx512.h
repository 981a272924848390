// Quantized rows times tokens on AVX-512 with VBMI and VNNI. One row of codes, one token:
//
//   y = unit * ( sum_g scale[g] * D[g]  +  sum_g shift[g] * X[g] ),    D[g] = sum_k u[k] * x[k]  (integers)
//
// x is 24-bit fixed point, x = 65536 h + 256 m + l with signed bytes h, m, l (qmatmul_prepare). u is the code
// itself, or a table's entry above the table's smallest one, so it is unsigned; what that leaves out is
// linear in X[g], the sum of x over the group. vpdpbusd adds 4 products u8*s8 into each of 16 int32 lanes:
// nothing is rounded inside a group.
//
// Any width is unpacked in natural order by two instructions: 64 codes are 8*bits bytes; vpermb brings the
// bytes of 8 codes into each 64-bit word, vpmultishiftqb takes 8 bits at every code's first bit. Bits above
// the code are masked off, or ignored by a 64-entry table that repeats itself. The width is therefore data,
// not code.
//
// One core must turn ~25 GB/s of codes into products: for 2 bits that is 64 codes in 3 cycles. Byte counts
// per 64 codes: 8*bits of codes from memory, 192 of x from L1. Who owns what: a call owns rows [begin, end)
// for every token of the task; 16 rows are reduced together.
#pragma once
#include "qmatmul_avx512_prepare.h"

namespace hm {
namespace {

constexpr int64_t kRunVectors = 32;  // int32 lanes hold 32 * 4 * 255 * 128 << 8
constexpr int64_t kAhead = 4096;     // prefetch distance, bytes

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
    for (int t = 0; t < kTokens; ++t)
      for (int i = 0; i < kChains<kKind, kTokens>; ++i) s[t][i] = _mm512_setzero_si512();
  }
};

inline __m512i dot(__m512i sum, __m512i u, const int8_t* x) {
  return _mm512_dpbusd_epi32(sum, u, _mm512_load_si512(x));
}

// Adds the products of 64 codes at p.
template <int kKind, int kTokens>
inline __attribute__((always_inline)) void add64(const UnpackPlan& c, const uint8_t* p, __mmask64 bytes,
                                                 const int8_t* const* x, int64_t at,
                                                 Sums<kKind, kTokens>& sums) {
  __m512i v = _mm512_permutexvar_epi8(c.index, _mm512_maskz_loadu_epi8(bytes, p));
  v = _mm512_multishift_epi64_epi8(c.shift, v);
  __m512i u = kKind == kCode ? _mm512_and_si512(v, c.mask) : _mm512_permutexvar_epi8(v, c.table[0]);
  __m512i u1 = u, u0 = u;
  if (kKind == kWide) {
    u1 = _mm512_permutexvar_epi8(v, c.table[1]);
    u0 = _mm512_permutexvar_epi8(v, c.table[2]);
  } else if (kKind == kPair) {
    u1 = _mm512_and_si512(v, c.pair[0]);
    u0 = _mm512_and_si512(v, c.pair[1]);
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
    const int8_t *h = x[t] + at, *m = h + 64, *l = h + 128;
    __m512i* s = sums.s[t];
    if (kKind == kPair) {
      s[0] = dot(s[0], u1, h);
      s[1] = dot(s[1], u1, m);
      s[2] = dot(s[2], u0, h);
      s[3] = dot(s[3], u0, m);
      s[4] = dot(s[4], u, l);
    } else if (kKind == kWide) {
      constexpr bool own = kTokens == 1;
      s[0] = dot(s[0], u, h);
      s[1] = dot(s[1], u1, h);
      s[own ? 3 : 1] = dot(s[own ? 3 : 1], u, m);
      s[2] = dot(s[2], u0, h);
      s[own ? 4 : 2] = dot(s[own ? 4 : 2], u1, m);
      s[own ? 5 : 2] = dot(s[own ? 5 : 2], u, l);
    } else {
      s[0] = dot(s[0], u, h);
      s[1] = dot(s[1], u, m);
      s[2] = dot(s[2], u, l);
    }
  }
}

// A row's float sums of one token.
struct RowSums {
  __m512 high, low, shift;
};

template <int kKind, int kTokens>
inline __attribute__((always_inline)) void flush(const UnpackPlan& c, Sums<kKind, kTokens>& sums,
                                                 __m512 scale, RowSums* row) {
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
    __m512i* s = sums.s[t];
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

// The scale of each of 16 blocks of 32 columns from `first` on, where `ratio` blocks share one.
inline __m512 load_block_scales(const QmatmulTask& task, const uint8_t* row, int64_t first, int n,
                                int64_t ratio) {
  if (task.table == hm_e2m1_gguf) {
    uint8_t e[16] = {};
    for (int i = 0; i < n; ++i) e[i] = row[(first + i) * 17];
    return load_scales(e, 0, n, hm_e8m0);
  }
  if (ratio == 1) return load_scales(row, first, n, task.scale_type);
  alignas(64) float s[16] = {};
  for (int i = 0; i < n; ++i)
    s[i] = _mm512_cvtss_f32(load_scales(row, (first + i) / ratio, 1, task.scale_type));
  return _mm512_load_ps(s);
}

// What a row needs besides its codes.
struct RowScales {
  const uint8_t *codes, *scale, *bias;
  float norm;  // power of two that keeps scale * sum inside f32
};

// One row whose groups are an odd number of 32-column blocks: a vector of 64 codes may hold two scales.
template <int kKind, int kTokens>
void half_vector_row(const QmatmulTask& task, const UnpackPlan& c, const RowScales& r, const int8_t* const* x,
                     const float* const* sums, RowSums* row, __m512& largest) {
  const uint8_t* p = r.codes;
  const uint8_t* scale = task.table == hm_e2m1_gguf ? r.codes : r.scale;
  const int64_t blocks = task.columns / 32, ratio = task.group / 32;
  int64_t vector = 0;
  Sums<kKind, kTokens> s;
  for (int64_t first = 0; first < blocks; first += 16) {
    int count = int(blocks - first < 16 ? blocks - first : 16);
    __m512 sv = load_block_scales(task, scale, first, count, ratio);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(sv));
    sv = mul(sv, splat(r.norm));
    if (c.offset != 0) {
      __m512 shift = r.bias ? mul(load_block_scales(task, r.bias, first, count, ratio), splat(r.norm)) : sv;
      for (int t = 0; t < kTokens; ++t) row[t].shift = fma(shift, load(sums[t] + first), row[t].shift);
    }
    __m512i which = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    for (int j = 0; j < count; j += 2, ++vector, p += c.stride) {
      s.clear();
      if (!(vector & 1)) _mm_prefetch(reinterpret_cast<const char*>(p + kAhead), _MM_HINT_T1);
      add64<kKind, kTokens>(c, p, vector < c.vectors ? c.whole : c.tail, x, vector * 192, s);
      flush<kKind, kTokens>(c, s, _mm512_permutexvar_ps(which, sv), row);
      which = _mm512_add_epi32(which, _mm512_set1_epi32(2));
    }
  }
}

// One row whose groups are whole vectors. kRun: vectors between two scales when known (unrolled), else 0.
template <int kKind, int kTokens, int kRun>
void grouped_row(const QmatmulTask& task, const UnpackPlan& c, const RowScales& r, const int8_t* const* x,
                 const float* const* sums, RowSums* row, __m512& largest) {
  const uint8_t* p = r.codes;
  const int64_t groups = task.columns / task.group, run = task.group / 64;
  int64_t at = 0;
  Sums<kKind, kTokens> s;
  alignas(64) float scales[16];
  for (int64_t first = 0; first < groups; first += 16) {
    int count = int(groups - first < 16 ? groups - first : 16);
    __m512 sv = load_scales(r.scale, first, count, task.scale_type);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(sv));
    sv = mul(sv, splat(r.norm));
    if (c.offset != 0) {
      __m512 shift = r.bias ? mul(load_scales(r.bias, first, count, task.scale_type), splat(r.norm)) : sv;
      for (int t = 0; t < kTokens; ++t) row[t].shift = fma(shift, load(sums[t] + first), row[t].shift);
    }
    _mm512_store_ps(scales, sv);
    for (int j = 0; j < count; ++j)
      for (int64_t done = 0; done < (kRun ? 1 : run); done += kRunVectors) {
        int64_t vectors = kRun ? kRun : run - done < kRunVectors ? run - done : kRunVectors;
        s.clear();
        for (int64_t i = 0; i < vectors; ++i, p += c.stride, at += 192) {
          if (!(at & 64)) _mm_prefetch(reinterpret_cast<const char*>(p + kAhead), _MM_HINT_T1);
          add64<kKind, kTokens>(c, p, c.whole, x, at, s);
        }
        flush<kKind, kTokens>(c, s, splat(scales[j]), row);
      }
  }
}

// One row under one scale, which the caller applies. Two sets of sums for one token: see kChains.
template <int kKind, int kTokens>
void whole_row(const UnpackPlan& c, const uint8_t* p, const int8_t* const* x, RowSums* row) {
  constexpr int kSets = kTokens == 1 ? 2 : 1;
  int64_t left = c.vectors, at = 0;
  bool tail = c.has_tail;
  while (left > 0 || tail) {
    Sums<kKind, kTokens> s[kSets];
    for (int i = 0; i < kSets; ++i) s[i].clear();
    int64_t vectors = left < kRunVectors ? left : kRunVectors, i = 0;
    left -= vectors;
    for (; i + 2 <= vectors; i += 2, p += 2 * c.stride, at += 384) {
      _mm_prefetch(reinterpret_cast<const char*>(p + kAhead), _MM_HINT_T1);
      add64<kKind, kTokens>(c, p, c.whole, x, at, s[0]);
      add64<kKind, kTokens>(c, p + c.stride, c.whole, x, at + 192, s[kSets - 1]);
    }
    if (i < vectors) {
      add64<kKind, kTokens>(c, p, c.whole, x, at, s[0]);
      p += c.stride;
      at += 192;
    } else if (tail && left == 0) {
      add64<kKind, kTokens>(c, p, c.tail, x, at, s[0]);
      tail = false;
    }
    if (kSets == 2)
      for (int k = 0; k < kChains<kKind, kTokens>; ++k)
        s[0].s[0][k] = _mm512_add_epi32(s[0].s[0][k], s[1].s[0][k]);
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

template <int kKind, int kTokens>
void one_row(const QmatmulTask& task, const UnpackPlan& c, const RowScales& r, const int8_t* const* x,
             const float* const* sums, RowSums* row, __m512& largest) {
  for (int t = 0; t < kTokens; ++t) row[t] = {zero(), zero(), zero()};
  if (task.group == task.columns && task.table != hm_e2m1_gguf)
    return whole_row<kKind, kTokens>(c, r.codes, x, row);
  if (task.group % 64) return half_vector_row<kKind, kTokens>(task, c, r, x, sums, row, largest);
  if (task.group == 64) return grouped_row<kKind, kTokens, 1>(task, c, r, x, sums, row, largest);
  if (task.group == 128) return grouped_row<kKind, kTokens, 2>(task, c, r, x, sums, row, largest);
  grouped_row<kKind, kTokens, 0>(task, c, r, x, sums, row, largest);
}

// Rows [begin, begin + count), count <= 16, for tokens [first, first + kTokens).
template <int kKind, int kTokens>
void sixteen_rows(const QmatmulTask& task, const UnpackPlan& c, int64_t begin, int count, int64_t first) {
  const int8_t* x[kTokens];
  const float* sums[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    x[t] = task.tokens[first + t]->planes;
    sums[t] = task.tokens[first + t]->sums + task.sums_offset;
  }
  const bool whole = task.group == task.columns && task.table != hm_e2m1_gguf;
  __m512 lanes[kTokens][16];
  alignas(64) double factor[16] = {}, bias[16] = {};
  for (int i = 0; i < 16; ++i) {
    if (i >= count) {
      for (int t = 0; t < kTokens; ++t) lanes[t][i] = zero();
      continue;
    }
    int64_t n = begin + i;
    RowScales r{task.codes + n * task.row_bytes, task.scale ? task.scale + n * task.scale_stride : nullptr,
                task.bias ? task.bias + n * task.scale_stride : nullptr, 1.0f};
    RowSums row[kTokens];
    __m512 largest = zero();
    one_row<kKind, kTokens>(task, c, r, x, sums, row, largest);
    factor[i] = 1;
    if (whole) {
      factor[i] = double(_mm512_cvtss_f32(load_scales(r.scale, 0, 1, task.scale_type)));
      if (r.bias) bias[i] = double(_mm512_cvtss_f32(load_scales(r.bias, 0, 1, task.scale_type)));
    } else if (float top = max_of(largest); top > 0x1p60f || (top < 0x1p-60f && top > 0)) {
      // Sums reach 2^40: scales near the ends of f32 (E8M0 spans 2^-127 to 2^127) move to the middle.
      r.norm = top > 1 ? 0x1p-64f : 0x1p64f;
      one_row<kKind, kTokens>(task, c, r, x, sums, row, largest);
      factor[i] = top > 1 ? 0x1p64 : 0x1p-64;
    }
    for (int t = 0; t < kTokens; ++t)
      lanes[t][i] =
          fma(row[t].shift, splat(c.offset), fma(row[t].low, splat(c.low), mul(row[t].high, splat(c.high))));
  }
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

template <int kKind>
void quantized_rows(const QmatmulTask& task, const UnpackPlan& c, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += 16) {
    int count = int(end - n < 16 ? end - n : 16);
    int64_t t = 0;
    for (; t + 4 <= task.token_count; t += 4) sixteen_rows<kKind, 4>(task, c, n, count, t);
    for (; t + 2 <= task.token_count; t += 2) sixteen_rows<kKind, 2>(task, c, n, count, t);
    for (; t < task.token_count; ++t) sixteen_rows<kKind, 1>(task, c, n, count, t);
  }
}

void qmatmul_quantized(const QmatmulTask& task, int64_t begin, int64_t end) {
  UnpackPlan c;
  switch (plan_unpack(task, c)) {
    case kCode:
      return quantized_rows<kCode>(task, c, begin, end);
    case kTable:
      return quantized_rows<kTable>(task, c, begin, end);
    case kWide:
      return quantized_rows<kWide>(task, c, begin, end);
    case kPair:
      return quantized_rows<kPair>(task, c, begin, end);
  }
}

}  // namespace
}  // namespace hm
