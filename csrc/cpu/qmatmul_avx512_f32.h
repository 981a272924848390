// Rows of f32 numbers times tokens on AVX-512: codebooks, whose entries are any f32 number, and plain weights.
//
// A block is 128 columns, 8 vectors. Codes: 8 consecutive ones lie in the low bits of each of 16 lanes; a shift brings
// code j of every lane down and vpermps looks 16 of them up. It reads 4 bits of its index, so books of 4 and 8 entries
// are repeated and the bits above a code do no harm. Two codes of 2 bits share a shift: a second table answers to the
// upper one. Their tokens lie as [padded / 128][8 codes][16 lanes] (qmatmul_avx512_prepare.h), those of plain weights
// as they are.
//
// Whatever the tile of rows and tokens, a block's sum is two chains, and a row adds its blocks in order, each under
// its scale: the order of additions depends on the column alone, and a long row rounds little. Blocks are
// independent, so one row keeps a core busy, and memory is fastest read in one stream; books of 2 bits, where arithmetic
// is the limit, take four rows for one token. Sixteen rows are reduced together.
#pragma once
#include "qmatmul_avx512_scales.h"

namespace hm {
namespace {

constexpr int64_t kAhead = 4096;  // prefetch distance, bytes

// Rows of codes of a book.
template <int kBits>
struct BookRows {
  static constexpr int kBlockBytes = 16 * kBits, kRows = kBits == 2 ? 4 : 1;  // rows at once for one token
  struct Block {
    __m512i codes;
  };
  __m512 table, upper;  // upper: 2 bits, the code in bits 2 and 3 of an index
  __m512i index;        // 3 bits: the bytes of a lane
  __mmask64 tail;       // bytes of the last block where it is not whole

  explicit BookRows(const QmatmulTask& task) {
    alignas(64) float book[16], low[16], high[16];
    alignas(64) uint8_t bytes[64];
    memcpy(book, task.codebook, size_t(4) << kBits);
    for (int i = 0; i < 16; ++i) {
      low[i] = book[i & ((1 << kBits) - 1)];
      high[i] = book[i >> 2];
    }
    for (int i = 0; i < 64; ++i) bytes[i] = uint8_t(i / 4 * kBits + i % 4);
    table = _mm512_load_ps(low);
    upper = _mm512_load_ps(high);
    index = _mm512_load_si512(bytes);
    tail = first_bytes((task.columns % 128 * kBits + 7) / 8);
  }
  static const float* token(const QmatmulInput& in) { return in.spread; }

  HM_INLINE Block load(const uint8_t* p) const {
    if (kBits == 4) return {_mm512_loadu_si512(p)};
    if (kBits == 2) return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    return {_mm512_permutexvar_epi8(index, _mm512_maskz_loadu_epi8(first_bytes(48), p))};
  }
  HM_INLINE Block load_last(const uint8_t* p) const {
    const __m512i v = _mm512_maskz_loadu_epi8(tail, p);
    if (kBits == 4) return {v};
    if (kBits == 2) return {_mm512_cvtepu16_epi32(_mm512_castsi512_si256(v))};
    return {_mm512_permutexvar_epi8(index, v)};
  }
  HM_INLINE __m512 vector(const Block& b, int j) const {
    const bool high = kBits == 2 && j % 2;
    const int shift = high ? (j - 1) * kBits : j * kBits;
    return _mm512_permutexvar_ps(_mm512_srli_epi32(b.codes, unsigned(shift)), high ? upper : table);
  }
};

// Rows of bf16, f16 or f32.
template <int kType>
struct PlainRows {
  static constexpr int kSize = kType == hm_f32 ? 4 : 2, kBlockBytes = 128 * kSize, kRows = 1;
  struct Block {
    const uint8_t* p;
    int live;  // columns
  };
  int rest;  // columns of the last block where it is not whole

  explicit PlainRows(const QmatmulTask& task) : rest(int(task.columns % 128)) {}
  static const float* token(const QmatmulInput& in) { return in.x; }

  HM_INLINE Block load(const uint8_t* p) const { return {p, 128}; }
  HM_INLINE Block load_last(const uint8_t* p) const { return {p, rest}; }
  HM_INLINE __m512 vector(const Block& b, int j) const {
    const uint8_t* p = b.p + 16 * j * kSize;
    const int n = b.live - 16 * j;
    if (kType == hm_f32) return _mm512_maskz_loadu_ps(first_lanes(n), p);
    const __m256i h = n >= 16 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                              : _mm256_maskz_loadu_epi16(first_lanes(n), p);
    if (kType == hm_f16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  static __mmask16 first_lanes(int n) { return n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1 << n) - 1); }
};

// Lanes of a block under several scales: 8 columns are in one group.
__attribute__((noinline)) __m512 cut_scales(const QmatmulTask& task, const uint8_t* scale, int64_t block) {
  alignas(64) float s[16] = {};
  for (int i = 0; i < 16 && block * 128 + 8 * i < task.columns; ++i)
    s[i] = load1(scale, (block * 128 + 8 * i) / task.group, Dtype(task.scale_type));
  return _mm512_load_ps(s);
}

// One tile: rows[r] points at a row's numbers or codes, scales[r] at its scales; sums to out.
template <class D, int kRows, int kTokens, bool kWhole>
HM_INLINE void f32_tile(const D& decode, const QmatmulTask& task, const uint8_t* const* rows,
                        const uint8_t* const* scales, const float* const* tokens, __m512 (&out)[kTokens][kRows]) {
  const D d = decode;
  const int64_t blocks = task.columns / 128, in_group = kWhole || task.group % 128 ? 0 : task.group / 128;
  const uint8_t* p[kRows];
  const float* x[kTokens];
  __m512 row[kTokens][kRows];
  HM_UNROLL
  for (int r = 0; r < kRows; ++r) p[r] = rows[r];
  HM_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    x[t] = tokens[t];
    HM_UNROLL
    for (int r = 0; r < kRows; ++r) row[t][r] = zero();
  }
  int64_t group = 0, left = in_group;
  auto next = [&](const typename D::Block(&b)[kRows], int64_t block) __attribute__((always_inline)) {
    __m512 sums[kTokens][kRows][2];
    HM_UNROLL
    for (int j = 0; j < 8; ++j) HM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const __m512 w = d.vector(b[r], j);
      HM_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        __m512& s = sums[t][r][j & 1];
        const __m512 v = _mm512_load_ps(x[t] + block * 128 + 16 * j);
        s = j < 2 ? mul(w, v) : fma(w, v, s);
      }
    }
    HM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      __m512 scale;
      if (!kWhole)
        scale = in_group ? splat(load1(scales[r], group, Dtype(task.scale_type))) : cut_scales(task, scales[r], block);
      HM_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const __m512 s = add(sums[t][r][0], sums[t][r][1]);
        row[t][r] = kWhole ? add(row[t][r], s) : fma(s, scale, row[t][r]);
      }
    }
    if (!kWhole && --left == 0) ++group, left = in_group;
  };
  typename D::Block b[kRows];
  for (int64_t block = 0; block < blocks; ++block) {
    HM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      b[r] = d.load(p[r]);
      HM_UNROLL
      for (int i = 0; i < (D::kBlockBytes + 63) / 64; ++i)
        _mm_prefetch(reinterpret_cast<const char*>(p[r] + kAhead + 64 * i), _MM_HINT_T0);
      p[r] += D::kBlockBytes;
    }
    next(b, block);
  }
  if (task.columns % 128) {
    HM_UNROLL
    for (int r = 0; r < kRows; ++r) b[r] = d.load_last(p[r]);
    next(b, blocks);
  }
  HM_UNROLL
  for (int t = 0; t < kTokens; ++t) HM_UNROLL
  for (int r = 0; r < kRows; ++r) out[t][r] = row[t][r];
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

// Lanes of up to 16 rows of one token, summed and scaled, to memory.
inline void store_f32_rows(const QmatmulTask& task, bool whole, int64_t row, int rows, int64_t token, __m512* lanes) {
  for (int i = rows; i < 16; ++i) lanes[i] = zero();
  __m512 y = sum16(lanes);
  if (whole) y = mul(y, row_scales(task.scale + row * task.scale_stride, rows, task.scale_type));
  alignas(64) float f[16];
  _mm512_store_ps(f, y);
  narrow(f, task.out[token] + row * (task.out_type == hm_f32 ? 4 : 2), rows, Dtype(task.out_type));
}

// Rows [row, row + rows), at most 16, of tokens [first, first + kTokens) straight from codes or numbers.
template <class D, int kRows, int kTokens, bool kWhole>
void direct_rows(const D& d, const QmatmulTask& task, int64_t row, int rows, int64_t first) {
  const float* x[kTokens];
  for (int t = 0; t < kTokens; ++t) x[t] = D::token(*task.tokens[first + t]);
  __m512 lanes[kTokens][16];
  for (int i = 0; i < rows; i += kRows) {
    const uint8_t *p[kRows], *scales[kRows];
    for (int r = 0; r < kRows; ++r) {  // past the last row it is repeated, into lanes that are not stored
      const int64_t at = row + (i + r < rows ? i + r : rows - 1);
      p[r] = task.codes + at * task.row_bytes;
      scales[r] = task.scale + at * task.scale_stride;
    }
    __m512 out[kTokens][kRows];
    f32_tile<D, kRows, kTokens, kWhole>(d, task, p, scales, x, out);
    for (int t = 0; t < kTokens; ++t)
      for (int r = 0; r < kRows; ++r) lanes[t][i + r] = out[t][r];
  }
  for (int t = 0; t < kTokens; ++t) store_f32_rows(task, task.scale && kWhole, row, rows, first + t, lanes[t]);
}

template <class D, bool kWhole>
void f32_rows_of(const QmatmulTask& task, int64_t begin, int64_t end) {
  const D d(task);
  for (int64_t n = begin; n < end; n += 16) {
    const int rows = int(end - n < 16 ? end - n : 16);
    int64_t t = 0;
    for (; t + 4 <= task.token_count; t += 4) direct_rows<D, 1, 4, kWhole>(d, task, n, rows, t);
    for (; t + 2 <= task.token_count; t += 2) direct_rows<D, 2, 2, kWhole>(d, task, n, rows, t);
    for (; t < task.token_count; ++t) direct_rows<D, D::kRows, 1, kWhole>(d, task, n, rows, t);
  }
}

template <int kBits>
void book_rows(const QmatmulTask& task, int64_t begin, int64_t end) {
  task.group == task.columns ? f32_rows_of<BookRows<kBits>, true>(task, begin, end)
                             : f32_rows_of<BookRows<kBits>, false>(task, begin, end);
}

void qmatmul_codebook(const QmatmulTask& task, int64_t begin, int64_t end) {
  if (task.bits == 2) return book_rows<2>(task, begin, end);
  if (task.bits == 3) return book_rows<3>(task, begin, end);
  book_rows<4>(task, begin, end);
}

void qmatmul_plain(const QmatmulTask& task, int64_t begin, int64_t end) {
  if (task.scale_type == hm_f32) return f32_rows_of<PlainRows<hm_f32>, true>(task, begin, end);
  if (task.scale_type == hm_f16) return f32_rows_of<PlainRows<hm_f16>, true>(task, begin, end);
  f32_rows_of<PlainRows<hm_bf16>, true>(task, begin, end);
}

}  // namespace
}  // namespace hm
