// Codes of 16 rows to unsigned bytes, on AVX-512: how a word of codes reaches lane r of a vector, r the row, and
// how bytes come out of it. The equations are in qmatmul_avx512.h.
//
//   chunk    16 words of each of 16 rows: one load a row, then a 16 x 16 transpose: vector w has word w of all rows
//   word     4 V codes of one row in 32 bits; a shift brings 4 of them to the bottoms of 4 bytes, V times
//
//   bits   V   a word is
//   2      4   4 bytes as stored
//   4      2   4 bytes as stored
//   3      2   3 bytes and a gap: vpermb spreads 48 bytes
//   8      1   4 bytes as stored
//   5, 6, GGUF's E2M1   1   4 codes a byte each: vpermb and vpmultishiftqb before the transpose
#pragma once
#include "qmatmul_avx512_prepare.h"

namespace hm {
namespace {

// Arrays of vectors stay in registers only where every loop over them is unrolled.
#define HM_UNROLL _Pragma("GCC unroll 16")

template <int kBits_, bool kLooksUp_ = false, bool kGguf_ = false>
struct Codes {
  static constexpr int kBits = kBits_;
  static constexpr bool kLooksUp = kLooksUp_, kGguf = kGguf_;  // E2M1: the double of a number is a byte
  static constexpr bool kBytes = kGguf || kBits > 4;           // 4 codes to a word
  static constexpr int kLayout = kBytes ? 0 : kBits == 2 ? 2 : 1, kVectors = 1 << kLayout;
  static constexpr int kColumns = 64 * kVectors;                     // of a chunk
  static constexpr int kStride = kGguf ? 34 : kColumns * kBits / 8;  // bytes of a chunk of one row
};

// What the kernels of a task need besides its codes. A code stands for unit * (u - centre), u the byte it becomes.
struct CodePlan {
  __m512i index, shift[2], first;  // first: the code's bits, or the table
  float unit;
  int centre;
};

// Where byte i of a spread chunk finds its codes.
inline void plan_spread(const QmatmulTask& task, CodePlan& c) {
  const bool gguf = task.table == hm_e2m1_gguf;
  const int bits = task.bits;
  alignas(64) uint8_t index[64], shift[64];
  for (int i = 0; i < 64; ++i) {
    if (gguf) {  // block i / 32: a scale byte, then byte j holds code j below and code j + 16 above
      const int code = i % 32;
      index[i] = uint8_t(i / 32 * 17 + 1 + code % 16);
      shift[i] = uint8_t(i % 8 * 8 + (code < 16 ? 0 : 4));
    } else if (bits == 3) {  // lane i / 4 holds 8 codes in 3 bytes
      index[i] = uint8_t(i / 4 * 3 + (i % 4 < 3 ? i % 4 : 0));
      shift[i] = uint8_t(i / 4 % 2 * 32 + i % 4 * 6);
    } else {  // a word of 64 bits holds 8 codes
      index[i] = uint8_t(i / 8 * bits + (i % 8 < bits ? i % 8 : 0));
      shift[i] = uint8_t(i % 8 * bits);
    }
  }
  c.index = _mm512_load_si512(index);
  c.shift[0] = _mm512_load_si512(shift);
  c.shift[1] = _mm512_add_epi8(c.shift[0], _mm512_set1_epi8(char(bits)));
}

inline void plan_codes(const QmatmulTask& task, CodePlan& c) {
  plan_spread(task, c);
  const bool e2m1 = task.table == hm_e2m1 || task.table == hm_e2m1_gguf;
  c.centre = qmatmul_level(task.table, task.bits, 32, false).centre;
  c.unit = e2m1 ? 0.5f : 1.0f;
  c.first = _mm512_set1_epi8(char((1 << task.bits) - 1));
  if (!e2m1) return;
  alignas(64) uint8_t table[64];  // repeated: vpermb reads 6 bits of its index
  for (int i = 0; i < 64; ++i) table[i] = uint8_t(e2m1_doubled[i % 16] + c.centre);
  c.first = _mm512_load_si512(table);
}

// Row w of the result has element w of every row of a.
HM_INLINE void transpose(__m512i (&a)[16]) {
  __m512i b[16];
  HM_UNROLL
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  HM_UNROLL
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  HM_UNROLL
  for (int j = 0; j < 4; ++j) {
    const __m512i even0 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), odd0 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xDD);
    const __m512i even1 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    const __m512i odd1 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xDD);
    b[j] = _mm512_shuffle_i32x4(even0, even1, 0x88);
    b[4 + j] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
    b[8 + j] = _mm512_shuffle_i32x4(even0, even1, 0xDD);
    b[12 + j] = _mm512_shuffle_i32x4(odd0, odd1, 0xDD);
  }
  HM_UNROLL
  for (int i = 0; i < 16; ++i) a[i] = b[i];
}

inline __mmask64 first_bytes(int64_t n) { return n >= 64 ? ~__mmask64(0) : (__mmask64(1) << n) - 1; }

// Words of 16 rows from p, `bytes` of each (all of a chunk's, or what is left of the row). Rows past the last one
// repeat it. Memory is read in order, so the far prefetch runs along the codes of the rows behind these, and the
// near one fetches each row's next chunks from there; a line past them, for rows seldom begin at one.
template <class C>
HM_INLINE void load_chunk(const CodePlan& c, const uint8_t* p, int64_t row_bytes, int rows, int64_t bytes,
                          const uint8_t* far, __m512i (&a)[16]) {
  if (__builtin_expect(bytes >= C::kStride && rows == 16, 1)) {
    HM_UNROLL
    for (int r = 0; r < 16; ++r) {
      const uint8_t* row = p + r * row_bytes;
      a[r] = C::kStride == 64 ? _mm512_loadu_si512(row) : _mm512_maskz_loadu_epi8(first_bytes(C::kStride), row);
      _mm_prefetch(reinterpret_cast<const char*>(row + C::kStride + 128), _MM_HINT_T0);
      if (r < (C::kStride + 3) / 4) _mm_prefetch(reinterpret_cast<const char*>(far + 64 * r), _MM_HINT_T1);
    }
  } else {
    const __mmask64 live = first_bytes(bytes < C::kStride ? bytes : C::kStride);
    HM_UNROLL
    for (int r = 0; r < 16; ++r) a[r] = _mm512_maskz_loadu_epi8(live, p + (r < rows ? r : rows - 1) * row_bytes);
  }
  if (C::kStride != 64) {
    HM_UNROLL
    for (int r = 0; r < 16; ++r) {
      a[r] = _mm512_permutexvar_epi8(c.index, a[r]);
      if (C::kBytes) a[r] = _mm512_multishift_epi64_epi8(c.shift[0], a[r]);
      if (C::kBytes && !C::kLooksUp) a[r] = _mm512_and_si512(a[r], c.first);
    }
  }
  transpose(a);
}

// The bytes of vector s of a vector of words.
template <class C>
HM_INLINE __m512i unpack(const CodePlan& c, __m512i words, int s) {
  __m512i v = words;
  if (C::kBits == 3)
    v = _mm512_multishift_epi64_epi8(c.shift[s & 1], words);
  else if (!C::kBytes && s)
    v = _mm512_srli_epi16(words, unsigned(s * C::kBits));
  if (C::kLooksUp) return _mm512_permutexvar_epi8(v, c.first);
  return C::kBytes ? v : _mm512_and_si512(v, c.first);
}

}  // namespace
}  // namespace hm
