// Scales and biases of 16 rows, turned so that a vector has one group of all of them.
#pragma once
#include "qmatmul_avx512_codes.h"

namespace hm {
namespace {

// E8M0 bytes in 32 bits; byte 0 is 2^-127, byte 255 NaN.
inline __m512 from_e8m0(__m512i bytes) {
  const __m512i e = _mm512_max_epi32(_mm512_slli_epi32(bytes, 23), _mm512_set1_epi32(0x00400000));
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(bytes, _mm512_set1_epi32(255));
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(e, nan, _mm512_set1_epi32(0x7fc00000)));
}

// Bytes [0, n) of row r's scales as 16 words; rows past the last one repeat it.
inline void load_words(const uint8_t* p, int64_t stride, int rows, int64_t n, __m512i (&a)[16]) {
  const __mmask64 live = first_bytes(n);
  HM_UNROLL
  for (int r = 0; r < 16; ++r) {
    const uint8_t* row = p + (r < rows ? r : rows - 1) * stride;
    a[r] = _mm512_maskz_loadu_epi8(live, row);
    _mm_prefetch(reinterpret_cast<const char*>(row + 64 * stride), _MM_HINT_T0);
  }
}

// out[g][r] for groups [0, count) of rows whose scales start at p, `stride` bytes apart.
inline void turn_scales(const uint8_t* p, int64_t stride, int rows, int count, int type, float (*out)[16]) {
  const int per_load = type == hm_f32 || type == hm_f16 ? 16 : type == hm_bf16 ? 32 : 64;
  const int size = type == hm_f32 ? 4 : type == hm_e8m0 ? 1 : 2;
  for (int g = 0; g < count; g += per_load, p += per_load * size) {
    __m512i a[16];
    load_words(p, stride, rows, int64_t(count - g) * size < per_load * size ? (count - g) * size : per_load * size, a);
    if (type == hm_f16) {
      HM_UNROLL
      for (int r = 0; r < 16; ++r)
        a[r] = _mm512_castps_si512(_mm512_cvtph_ps(_mm512_castsi512_si256(a[r])));
    }
    transpose(a);
    float(*to)[16] = out + g;
    for (int w = 0; w < 16; ++w) {
      if (type == hm_bf16) {
        _mm512_store_si512(to[2 * w], _mm512_slli_epi32(a[w], 16));
        _mm512_store_si512(to[2 * w + 1], _mm512_and_si512(a[w], _mm512_set1_epi32(int(0xffff0000))));
      } else if (type == hm_e8m0) {
        for (int i = 0; i < 4; ++i)
          _mm512_store_ps(to[4 * w + i],
                          from_e8m0(_mm512_and_si512(_mm512_srli_epi32(a[w], unsigned(8 * i)), _mm512_set1_epi32(255))));
      } else {
        _mm512_store_si512(to[w], a[w]);
      }
    }
  }
}

// The same of GGUF's blocks, each scale the first of 17 bytes.
inline void turn_block_scales(const uint8_t* p, int64_t row_bytes, int rows, int count, float (*out)[16]) {
  for (int g = 0; g < count; ++g) {
    alignas(64) int32_t byte[16];
    for (int r = 0; r < 16; ++r) byte[r] = p[(r < rows ? r : rows - 1) * row_bytes + 17 * g];
    _mm512_store_ps(out[g], from_e8m0(_mm512_load_si512(byte)));
  }
}

// One scale (or bias) of each of up to 16 rows.
inline __m512 row_scales(const uint8_t* p, int rows, int type) {
  const __mmask16 live = __mmask16((1u << rows) - 1);
  if (type == hm_f32) return _mm512_maskz_loadu_ps(live, p);
  if (type == hm_e8m0) return from_e8m0(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(live, p)));
  const __m256i h = _mm256_maskz_loadu_epi16(live, p);
  if (type == hm_f16) return _mm512_cvtph_ps(h);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

}  // namespace
}  // namespace hm
