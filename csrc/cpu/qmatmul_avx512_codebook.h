// Rows of codebook codes times tokens on AVX-512: table look-ups and fused multiply-add in f32, since an
// entry is any f32 number.
//
// A block is 128 codes, 8 consecutive ones in the low bits of each of 16 lanes. A shift brings code j of
// every lane down and vpermps looks 16 of them up: it reads 4 bits of its index, so books of 4 and 8 entries
// are repeated and the bits above a code do no harm. Two codes of 2 bits share a shift: a second table
// answers to the upper one.
//
// Tokens lie as [padded / 128][8 codes][16 lanes] (qmatmul_avx512_prepare.h). Whatever the tile of rows and
// tokens, a block's sum is two chains, and a row adds its blocks in order, each under its scale: the order
// of additions depends on the column alone, and a long row rounds little.
#pragma once
#include "qmatmul_avx512_scales.h"

namespace hm {
namespace {

constexpr int64_t kAhead = 4096;  // prefetch distance, bytes

struct Book {
  __m512 table, upper;  // upper: 2 bits, the code in bits 2 and 3 of an index
  __m512i index;        // 3 bits: the bytes of a lane
  int64_t blocks;       // whole ones in a row
  int64_t per_group;    // blocks; 0: a block holds several scales
  __mmask64 tail;       // bytes of the last block where it is not whole
};

template <int kBits>
inline Book plan_book(const QmatmulTask& task) {
  Book b;
  alignas(64) float book[16], table[16], upper[16];
  alignas(64) uint8_t index[64];
  memcpy(book, task.codebook, size_t(4) << kBits);
  for (int i = 0; i < 16; ++i) {
    table[i] = book[i & ((1 << kBits) - 1)];
    upper[i] = book[i >> 2];
  }
  for (int i = 0; i < 64; ++i) index[i] = uint8_t(i / 4 * kBits + i % 4);
  b.table = _mm512_load_ps(table);
  b.upper = _mm512_load_ps(upper);
  b.index = _mm512_load_si512(index);
  b.blocks = task.columns / 128;
  b.per_group = task.group % 128 ? 0 : task.group / 128;
  b.tail = first_bytes((task.columns % 128 * kBits + 7) / 8);
  return b;
}

// A block's codes, 8 to a lane.
template <int kBits>
HM_INLINE __m512i load_codes(const Book& b, const uint8_t* p) {
  if (kBits == 4) return _mm512_loadu_si512(p);
  if (kBits == 2) return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_permutexvar_epi8(b.index, _mm512_maskz_loadu_epi8(first_bytes(48), p));
}
template <int kBits>
HM_INLINE __m512i load_last_codes(const Book& b, const uint8_t* p) {
  const __m512i v = _mm512_maskz_loadu_epi8(b.tail, p);
  if (kBits == 4) return v;
  if (kBits == 2) return _mm512_cvtepu16_epi32(_mm512_castsi512_si256(v));
  return _mm512_permutexvar_epi8(b.index, v);
}

template <int kBits>
HM_INLINE __m512 entries(const Book& b, __m512i codes, int j) {
  const bool upper = kBits == 2 && j % 2;
  const int shift = upper ? (j - 1) * kBits : j * kBits;
  return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, unsigned(shift)), upper ? b.upper : b.table);
}

// Lanes of a block under several scales: 8 columns are in one group.
__attribute__((noinline)) __m512 cut_scales(const QmatmulTask& task, const uint8_t* scale, int64_t block) {
  alignas(64) float s[16] = {};
  for (int i = 0; i < 16 && block * 128 + 8 * i < task.columns; ++i)
    s[i] = load1(scale, (block * 128 + 8 * i) / task.group, Dtype(task.scale_type));
  return _mm512_load_ps(s);
}

// Lane sums of kRows rows from `begin` on, for kTokens tokens; scaled unless a row has one scale.
template <int kBits, int kRows, int kTokens, bool kWhole>
HM_INLINE void book_tile(const QmatmulTask& task, const Book& plan, int64_t begin, const float* const* tokens,
                         __m512 (&row)[kTokens][kRows]) {
  const Book b = plan;
  const uint8_t* p[kRows];
  const uint8_t* scales[kRows];
  const float* x[kTokens];
  HM_UNROLL
  for (int r = 0; r < kRows; ++r) {
    p[r] = task.codes + (begin + r) * task.row_bytes;
    scales[r] = task.scale + (begin + r) * task.scale_stride;
  }
  HM_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    x[t] = tokens[t];
    HM_UNROLL
    for (int r = 0; r < kRows; ++r) row[t][r] = zero();
  }
  int64_t group = 0, left = b.per_group;
  auto next = [&](const __m512i(&codes)[kRows], int64_t block) __attribute__((always_inline)) {
    __m512 sums[kTokens][kRows][2];
    HM_UNROLL
    for (int j = 0; j < 8; ++j) HM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const __m512 w = entries<kBits>(b, codes[r], j);
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
        scale = b.per_group ? splat(load1(scales[r], group, Dtype(task.scale_type)))
                            : cut_scales(task, scales[r], block);
      HM_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const __m512 s = add(sums[t][r][0], sums[t][r][1]);
        row[t][r] = kWhole ? add(row[t][r], s) : fma(s, scale, row[t][r]);
      }
    }
    if (!kWhole && --left == 0) ++group, left = b.per_group;
  };
  __m512i codes[kRows];
  for (int64_t block = 0; block < b.blocks; ++block) {
    HM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      codes[r] = load_codes<kBits>(b, p[r]);
      _mm_prefetch(reinterpret_cast<const char*>(p[r] + kAhead), _MM_HINT_T0);
      p[r] += 16 * kBits;
    }
    next(codes, block);
  }
  if (!b.tail) return;
  HM_UNROLL
  for (int r = 0; r < kRows; ++r) codes[r] = load_last_codes<kBits>(b, p[r]);
  next(codes, b.blocks);
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

// Rows [begin, begin + count), count <= 16, for tokens [first, first + kTokens).
template <int kBits, int kTokens, bool kWhole>
void sixteen_book_rows(const QmatmulTask& task, const Book& b, int64_t begin, int count, int64_t first) {
  constexpr int kRows = 4 / kTokens;  // with two chains each, enough to hide the latency of a sum
  const float* x[kTokens];
  for (int t = 0; t < kTokens; ++t) x[t] = task.tokens[first + t]->spread;
  __m512 lanes[kTokens][16];
  int i = 0;
  for (; i + kRows <= count; i += kRows) {
    __m512 row[kTokens][kRows];
    book_tile<kBits, kRows, kTokens, kWhole>(task, b, begin + i, x, row);
    for (int t = 0; t < kTokens; ++t)
      for (int r = 0; r < kRows; ++r) lanes[t][i + r] = row[t][r];
  }
  for (; i < count; ++i) {
    __m512 row[kTokens][1];
    book_tile<kBits, 1, kTokens, kWhole>(task, b, begin + i, x, row);
    for (int t = 0; t < kTokens; ++t) lanes[t][i] = row[t][0];
  }
  for (; i < 16; ++i)
    for (int t = 0; t < kTokens; ++t) lanes[t][i] = zero();
  const int64_t item = task.out_type == hm_f32 ? 4 : 2;
  for (int t = 0; t < kTokens; ++t) {
    __m512 y = sum16(lanes[t]);
    if (kWhole) y = mul(y, row_scales(task.scale + begin * task.scale_stride, count, task.scale_type));
    store_rows(task, y, task.out[first + t] + begin * item, count);
  }
}

template <int kBits, bool kWhole>
void book_rows_of(const QmatmulTask& task, int64_t begin, int64_t end) {
  const Book b = plan_book<kBits>(task);
  for (int64_t n = begin; n < end; n += 16) {
    const int count = int(end - n < 16 ? end - n : 16);
    int64_t t = 0;
    for (; t + 4 <= task.token_count; t += 4) sixteen_book_rows<kBits, 4, kWhole>(task, b, n, count, t);
    for (; t + 2 <= task.token_count; t += 2) sixteen_book_rows<kBits, 2, kWhole>(task, b, n, count, t);
    for (; t < task.token_count; ++t) sixteen_book_rows<kBits, 1, kWhole>(task, b, n, count, t);
  }
}

template <int kBits>
void book_rows(const QmatmulTask& task, int64_t begin, int64_t end) {
  task.group == task.columns ? book_rows_of<kBits, true>(task, begin, end)
                             : book_rows_of<kBits, false>(task, begin, end);
}

void qmatmul_codebook(const QmatmulTask& task, int64_t begin, int64_t end) {
  if (task.bits == 2) return book_rows<2>(task, begin, end);
  if (task.bits == 3) return book_rows<3>(task, begin, end);
  book_rows<4>(task, begin, end);
}

}  // namespace
}  // namespace hm
