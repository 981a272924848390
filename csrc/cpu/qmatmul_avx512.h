// Quantized rows times tokens on AVX-512 with VBMI and VNNI. For 16 rows at once, row r in lane r:
//
//   y = sum_g ( scale[g] * ( D[g] * unit[g] ) + shift[g] * X[g] ),    D[g] = sum_k (u[k] - centre) * x[k]
//
// x is 24-bit fixed point in three signed bytes h m l, with a unit for each 128 columns (qmatmul_avx512_prepare.h).
// u is the code, or twice an E2M1 number above the smallest, an unsigned byte (qmatmul_avx512_codes.h). No byte holds
// entries of a codebook: qmatmul_avx512_f32.h. vpdpbusd adds 4 products
// u8 * s8 into each of 16 int32 lanes: the rows' words of 4 codes times one dword of x. X[g] is the sum of x over the
// group and shift what is left of the bias when codes count from their middle: a difference of two large terms would
// keep the roundings of both. The centre is taken off as integers: sums start at -centre * sum(x).
//
//         codes of 16 rows, one load each    16 x 16 transpose        1..4 vectors of u8     per token
//   row 0  | word 0 | word 1 | ... | 15 |    word w of rows 0..15  -> shift, mask, look up -> += u * x[h], x[m], x[l]
//   ...
//   row 15 | word 0 | word 1 | ... | 15 |
//
// A unit of columns (32, 64 or 128, inside one group) is an exact integer for each of h, m and l. It becomes f32 in one
// way, and y adds units in order. So a result has the same bits however many tokens, rows or threads share a call.
//
// One core must turn ~30 GB/s of codes into products. For 64 codes: 3 vpdpbusd, 4 / V shuffles
// of the transpose, 1 or 2 to unpack. Bytes: 8 * bits from memory, 192 of x from L1. More than four tokens unpack
// a panel once and pass over it four tokens at a time.
#pragma once
#include "qmatmul_avx512_f32.h"

namespace hm {
namespace {

constexpr int64_t kFar = 32768;    // bytes from a row to what is fetched from memory meanwhile
constexpr int kDirect = 4;         // tokens that take codes as they are unpacked
constexpr int kPanel = 2048;       // columns whose scales are turned at once, or half of them unpacked
constexpr int kMostGroups = kPanel / 32 + 64;  // that meet a panel, and what a load of them exceeds
constexpr int kTokenBlock = 256;   // tokens that share unpacked codes

// Integer sums of one unit: h m l. A token by itself has two sets, of even and odd words, or a sum would wait for the
// one before.
template <int kTokens>
struct Sums {
  static constexpr int kSets = kTokens == 1 ? 2 : 1;
  __m512i s[kTokens][kSets][3];
};

// acc + u * four columns, 4 bytes at x.
HM_INLINE __m512i dot(__m512i acc, __m512i u, const int8_t* x) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(u), "m"(*reinterpret_cast<const int32_t(*)[1]>(x)));
  return acc;
}

// The products of one vector of codes with kTokens tokens.
template <int kTokens>
HM_INLINE void multiply(__m512i u, const int8_t* const (&x)[kTokens], int64_t at, int set, Sums<kTokens>& sums) {
  HM_UNROLL
  for (int t = 0; t < kTokens; ++t) HM_UNROLL
  for (int p = 0; p < 3; ++p) sums.s[t][set][p] = dot(sums.s[t][set][p], u, x[t] + at + 4 * p);
}

// How a task's columns fall into units and groups.
struct Grid {
  int unit;           // columns
  int per_group;      // units
  bool whole_row;     // one scale a row: it joins at the end
  bool has_shift;
  int64_t row_bytes;  // of codes: what may be read of a row
  float centre;
};

template <class C>
inline Grid plan_grid(const QmatmulTask& task, const CodePlan& c) {
  Grid g;
  g.whole_row = task.group == task.columns && task.table != hm_e2m1_gguf;
  g.unit = qmatmul_level(task.table, C::kBits, task.group, g.whole_row).columns;
  g.per_group = g.whole_row ? 1 : int(task.group / g.unit);
  g.has_shift = task.table == hm_linear;
  g.row_bytes = C::kGguf ? task.columns / 32 * 17 : (task.columns * C::kBits + 7) / 8;
  g.centre = float(c.centre);
  return g;
}

// Up to 16 rows of codes over a panel of columns.
template <class C>
struct Panel {
  const QmatmulTask& task;
  const CodePlan& c;
  const Grid& grid;
  const uint8_t* codes;  // of the first row
  int rows;
  int64_t first, end;  // columns
  alignas(64) float scale[kMostGroups][16], shift[kMostGroups][16];  // of the groups that meet the panel
  __m512i* unpacked;

  int64_t chunks() const { return (end - first + C::kColumns - 1) / C::kColumns; }

  HM_INLINE void load(int64_t i, __m512i (&tile)[16]) const {
    const int64_t at = (first / C::kColumns + i) * C::kStride;
    const uint8_t* far = codes + i * 16 * C::kStride + kFar;
    load_chunk<C>(c, codes + at, task.row_bytes, rows, grid.row_bytes - at, far < task.codes_end ? far : codes, tile);
  }

  void unpack_all() {
    __m512i* to = unpacked;
    for (int64_t i = 0; i < chunks(); ++i) {
      __m512i tile[16];
      load(i, tile);
      HM_UNROLL
      for (int w = 0; w < 16; ++w) HM_UNROLL
      for (int s = 0; s < C::kVectors; ++s) _mm512_store_si512(to++, unpack<C>(c, tile[w], s));
    }
  }

  void load_scales(int64_t row) {
    if (grid.whole_row) return;
    const int64_t group = first / task.group;
    const int count = int((end - 1) / task.group - group + 1);
    const int64_t size = task.scale_type == hm_f32 ? 4 : task.scale_type == hm_e8m0 ? 1 : 2;
    const int64_t at = row * task.scale_stride + group * size;
    if (C::kGguf)
      turn_block_scales(codes + 17 * group, task.row_bytes, rows, count, scale);
    else
      turn_scales(task.scale + at, task.scale_stride, rows, count, task.scale_type, scale);
    if (c.unit != 1)
      for (int i = 0; i < count; ++i) _mm512_store_ps(scale[i], mul(_mm512_load_ps(scale[i]), splat(c.unit)));
    if (!grid.has_shift) return;
    if (task.bias) turn_scales(task.bias + at, task.scale_stride, rows, count, task.scale_type, shift);
    for (int i = 0; i < count; ++i)
      _mm512_store_ps(shift[i], fma(_mm512_load_ps(scale[i]), splat(grid.centre),
                                    task.bias ? _mm512_load_ps(shift[i]) : zero()));
  }
};

template <int kTokens>
HM_INLINE void begin_unit(const QmatmulUnit* const (&unit)[kTokens], Sums<kTokens>& sums) {
  HM_UNROLL
  for (int t = 0; t < kTokens; ++t) HM_UNROLL
  for (int p = 0; p < 3; ++p) {
    sums.s[t][0][p] = _mm512_set1_epi32(unit[t]->start[p]);
    if constexpr (kTokens == 1) sums.s[t][1][p] = _mm512_setzero_si512();
  }
}

// What sums of h, m and l add up to.
HM_INLINE __m512 number_of(__m512i h, __m512i m, __m512i l) {
  const __m512i high = _mm512_add_epi32(_mm512_slli_epi32(h, 8), m);
  return fma(_mm512_cvtepi32_ps(high), splat(256), _mm512_cvtepi32_ps(l));
}

// D of token t.
template <int kTokens>
HM_INLINE __m512 end_unit(const Sums<kTokens>& sums, int t) {
  __m512i s[3];
  HM_UNROLL
  for (int p = 0; p < 3; ++p) {
    s[p] = sums.s[t][0][p];
    if constexpr (kTokens == 1) s[p] = _mm512_add_epi32(s[p], sums.s[t][1][p]);
  }
  return number_of(s[0], s[1], s[2]);
}

// Adds a panel's products to y[t], 16 rows of each of kTokens tokens. kWords: of a unit. A function by itself, or
// the compiler runs out of registers for what goes on around it.
template <class C, int kWords, int kTokens, bool kUnpacked>
__attribute__((noinline)) void pass(const Panel<C>& panel, const QmatmulInput* const* tokens, float (*y)[16]) {
  constexpr int kStep = kWords < 16 ? kWords : 16, kWordBytes = 12 * C::kVectors;  // words of codes; bytes of x
  constexpr int kUnit = 4 * C::kVectors * kWords;
  const CodePlan c = panel.c;
  const bool whole_row = panel.grid.whole_row, has_shift = panel.grid.has_shift && !whole_row;
  const int per_group = panel.grid.per_group;
  const int8_t* x[kTokens];
  const QmatmulUnit* unit[kTokens];
  __m512 row[kTokens];
  int64_t column = panel.first, at = 0;
  HM_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    x[t] = tokens[t]->planes[C::kLayout] + column / (4 * C::kVectors) * kWordBytes;
    unit[t] = tokens[t]->units + panel.task.units + column / kUnit;
    row[t] = _mm512_load_ps(y[t]);
  }
  Sums<kTokens> sums;
  int group = 0, left = per_group - int(column / kUnit % per_group);
  const __m512i* words = panel.unpacked;
  for (int64_t i = 0, chunks = panel.chunks(); i < chunks; ++i) {
    __m512i tile[16];
    if (!kUnpacked) panel.load(i, tile);
    HM_UNROLL
    for (int w0 = 0; w0 < 16; w0 += kStep) {
      if (column >= panel.end) break;
      if (kWords <= 16 || column % kUnit == 0) begin_unit<kTokens>(unit, sums);
      HM_UNROLL
      for (int w = 0; w < kStep; ++w) HM_UNROLL
      for (int s = 0; s < C::kVectors; ++s) {
        const __m512i u = kUnpacked ? _mm512_load_si512(words + w * C::kVectors + s) : unpack<C>(c, tile[w0 + w], s);
        multiply<kTokens>(u, x, at + w * kWordBytes + 12 * s, kTokens == 1 ? w % 2 : 0, sums);
      }
      at += kStep * kWordBytes;
      words += kStep * C::kVectors;
      column += 4 * C::kVectors * kStep;
      if (kWords > 16 && column % kUnit && column < panel.end) continue;
      HM_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const __m512 d = mul(end_unit<kTokens>(sums, t), splat(unit[t]->unit));
        row[t] = whole_row ? add(row[t], d) : fma(d, _mm512_load_ps(panel.scale[group]), row[t]);
        if (has_shift) row[t] = fma(_mm512_load_ps(panel.shift[group]), splat(unit[t]->total), row[t]);
        ++unit[t];
      }
      if (--left == 0) ++group, left = per_group;
    }
  }
  HM_UNROLL
  for (int t = 0; t < kTokens; ++t) _mm512_store_ps(y[t], row[t]);
}

// All tokens, four at a time; a last group that is not full repeats its first token into rows nobody reads.
template <class C, int kWords>
void pass_all(const Panel<C>& panel, const QmatmulInput* const* tokens, int count, float (*y)[16]) {
  if (count == 1) return pass<C, kWords, 1, false>(panel, tokens, y);
  for (int t = 0; t < count; t += 4) {
    const QmatmulInput* four[4];
    for (int i = 0; i < 4; ++i) four[i] = tokens[t + i < count ? t + i : t];
    count > kDirect ? pass<C, kWords, 4, true>(panel, four, y + t) : pass<C, kWords, 4, false>(panel, four, y + t);
  }
}

// Scales of whole rows, and 16 rows of each token to memory.
inline void finish(const QmatmulTask& task, const CodePlan& c, const Grid& g, int64_t row, int rows, int64_t first, int count,
                   float (*y)[16]) {
  const int64_t item = task.out_type == hm_f32 ? 4 : 2;
  __m512 scale = zero(), shift = zero();
  if (g.whole_row) {
    scale = row_scales(task.scale + row * task.scale_stride, rows, task.scale_type);
    if (task.bias) shift = row_scales(task.bias + row * task.scale_stride, rows, task.scale_type);
    shift = fma(scale, splat(g.centre), shift);
    scale = mul(scale, splat(c.unit));
  }
  for (int t = 0; t < count; ++t) {
    if (g.whole_row) {
      __m512 v = mul(_mm512_load_ps(y[t]), scale);
      if (g.has_shift) {
        float total = 0;
        const QmatmulInput& in = *task.tokens[first + t];
        for (int64_t i = 0; i * g.unit < task.columns; ++i) total += in.units[task.units + i].total;
        v = fma(shift, splat(total), v);
      }
      _mm512_store_ps(y[t], v);
    }
    narrow(y[t], task.out[first + t] + row * item, rows, Dtype(task.out_type));
  }
}

template <class C>
void rows_of(const QmatmulTask& task, const CodePlan& c, int64_t begin, int64_t end) {
  const Grid grid = plan_grid<C>(task, c);
  alignas(64) __m512i unpacked[kPanel / 8];  // half a panel
  alignas(64) float y[kTokenBlock + 3][16];
  Panel<C> panel{task, c, grid, nullptr, 0, 0, 0, {}, {}, unpacked};
  for (int64_t row = begin; row < end; row += 16) {
    panel.rows = int(end - row < 16 ? end - row : 16);
    panel.codes = task.codes + row * task.row_bytes;
    for (int64_t t = 0; t < task.token_count; t += kTokenBlock) {
      const int count = int(task.token_count - t < kTokenBlock ? task.token_count - t : kTokenBlock);
      memset(y, 0, size_t(count + 3) * sizeof y[0]);
      const int64_t width = count > kDirect ? kPanel / 2 : kPanel;
      for (panel.first = 0; panel.first < task.columns; panel.first = panel.end) {
        panel.end = panel.first + width < task.columns ? panel.first + width : task.columns;
        panel.load_scales(row);
        if (count > kDirect) panel.unpack_all();
        const QmatmulInput* const* tokens = task.tokens + t;
        if (grid.unit == 128) pass_all<C, 32 / C::kVectors>(panel, tokens, count, y);
        if (grid.unit == 64) pass_all<C, 16 / C::kVectors>(panel, tokens, count, y);
        if (grid.unit == 32) pass_all<C, 8 / C::kVectors>(panel, tokens, count, y);
      }
      finish(task, c, grid, row, panel.rows, t, count, y);
    }
  }
}

// Calls f with the Codes of a task of bytes.
template <class F>
void with_codes(const QmatmulTask& task, F f) {
  if (task.table == hm_e2m1_gguf) return f(Codes<4, true, true>());
  if (task.table == hm_e2m1) return f(Codes<4, true>());
  switch (task.bits) {
    case 2: return f(Codes<2>());
    case 3: return f(Codes<3>());
    case 4: return f(Codes<4>());
    case 5: return f(Codes<5>());
    case 6: return f(Codes<6>());
    default: return f(Codes<8>());
  }
}

void qmatmul_quantized(const QmatmulTask& task, int64_t begin, int64_t end) {
  if (task.table == hm_codebook) return qmatmul_codebook(task, begin, end);
  CodePlan c;
  plan_codes(task, c);
  with_codes(task, [&](auto codes) { rows_of<decltype(codes)>(task, c, begin, end); });
}

}  // namespace
}  // namespace hm
