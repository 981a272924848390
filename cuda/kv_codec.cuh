// Codecs of pages: csrc/core/kv_codecs.h for a GPU. A page is 64 tokens of a head, its keys or its values, as words: codes,
// then scales. A head has d columns.
#pragma once
#include "number.cuh"

namespace hm {

enum Codec {
  kv_bf16, kv_h2, kv_h3, kv_h4, kv_h8, kv_turbo2, kv_turbo3, kv_turbo4, kv_fp8, kv_affine4, kv_affine8, kv_kivi2, kv_kivi4,
  kv_raw_f16, kv_raw_f32  // raw pages, of which bf16 ones are kv_bf16
};
constexpr uint PAGE = 64;

__host__ __device__ constexpr bool is_ours(int codec) { return codec >= kv_h2 && codec <= kv_h8; }
__host__ __device__ constexpr bool is_turbo(int codec) { return codec >= kv_turbo2 && codec <= kv_turbo4; }
__host__ __device__ constexpr bool is_affine(int codec) { return codec == kv_affine4 || codec == kv_affine8; }
__host__ __device__ constexpr bool is_kivi(int codec) { return codec == kv_kivi2 || codec == kv_kivi4; }
__host__ __device__ constexpr bool is_turned(int codec) { return codec >= kv_h2 && codec <= kv_turbo4; }
__host__ __device__ constexpr int code_bits(int codec) {
  if (codec == kv_raw_f32) return 32;
  if (codec == kv_bf16 || codec == kv_raw_f16) return 16;
  if (codec <= kv_h4) return codec + 1;
  if (is_turbo(codec)) return codec - 3;
  return codec == kv_kivi2 ? 2 : codec == kv_affine4 || codec == kv_kivi4 ? 4 : 8;
}
// Words of the codes of a page, where the scales begin; words of a page.
__host__ __device__ constexpr uint code_words(int codec, uint d) { return PAGE * d * code_bits(codec) / 32; }
__host__ __device__ constexpr uint page_words(int codec, uint d) {
  const uint scales = is_ours(codec) ? 32 : is_turbo(codec) ? 64 : is_affine(codec) ? d : is_kivi(codec) ? 2 * d : 0;
  return code_words(codec, d) + scales;
}
// 1 / sqrt(d), rounded once.
__host__ __device__ constexpr float root_of(int d) {
  return d == 32 ? 0.17677669529663687f : d == 64 ? 0.125f : d == 128 ? 0.08838834764831845f : 0.0625f;
}
// Raw pages have the numbers of a dtype. Where page p of a sequence is among its three: page 0, then every other one.
__device__ inline int raw_codec(int dtype) { return dtype == F32 ? kv_raw_f32 : dtype == F16 ? kv_raw_f16 : kv_bf16; }
__device__ inline uint raw_slot(uint p) { return p ? 1 + p % 2 : 0; }

// How the keys or the values of a layer are stored.
struct Side {
  int codec, values;   // Codec; whether they are values
  const float* signs;  // [d], of codecs that turn rows
  const float* book;   // [16], centroids of turbo codecs
  float scale;         // of fp8
};

__device__ inline uint half_bits(const uint* words, uint i) { return reinterpret_cast<const unsigned short*>(words)[i]; }
__device__ inline float half_at(const uint* words, uint i) { return from_f16(half_bits(words, i)); }
__device__ inline float bfloat_at(const uint* words, uint i) { return from_bf16(half_bits(words, i)); }
__device__ inline float from_e4m3(uint code) {  // 2^-8 of a half with fewer bits, which holds it exactly
  if ((code & 0x7fu) == 0x7fu) return __uint_as_float(0x7fc00000u);
  return from_f16((code & 0x80u) << 8 | (code & 0x7fu) << 7) * 256.0f;
}

// Levels of our codebooks, four to a word, a byte each: no table in memory is read.
template <int BITS>
__device__ inline float level(uint code) {
  uint four = 0x5a1be5a6u;
  if (BITS == 3) four = code & 4u ? 0x58371f0au : 0xf6e1c9a8u;
  if (BITS == 4) four = code & 8u ? (code & 4u ? 0x684f3e30u : 0x24190f05u) : (code & 4u ? 0xfbf1e7dcu : 0xd0c2b198u);
  return BITS == 8 ? float(int(code) - 128) : float(int(four << (24u - 8u * (code & 3u))) >> 24);
}
// Levels per deviation.
__host__ __device__ constexpr float kappa(int bits) { return bits == 2 ? 59.59375f : bits == 3 ? 40.90625f : 38.140625f; }

}  // namespace hm
