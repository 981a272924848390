// How keys and values are stored in the pages of a quantized cache. One line adds a codec to the kernels,
// to kv_codecs() and to the tests. Pages hold 64 tokens of one head and one side (keys or values); a side's
// bytes are its codes, then its scales. Means are in specs of the formats' owners and in reference_kv.py.
#pragma once
#if !defined(__METAL_VERSION__)
#include <stdint.h>
#endif

// name: bits of a code, then what it is
//   bf16          the number itself
//   h2 h3 h4 h8   ours: Hadamard rotation with signs, integer codebook, f16 scale per token
//   turbo2 3 4    mlx-swift-lm: the same rotation, Lloyd-Max codebook, f32 norm per token
//   fp8           E4M3 times one scale per head
//   affine4 8     MLX: code * scale + bias per 64 columns, both bf16
//   kivi2 4       code * scale + least per 32 tokens of a column (keys) or 32 columns of a token (values), both f16
#define HM_KV_CODECS(X) \
  X(bf16, 16)           \
  X(h2, 2)              \
  X(h3, 3)              \
  X(h4, 4)              \
  X(h8, 8)              \
  X(turbo2, 2)          \
  X(turbo3, 3)          \
  X(turbo4, 4)          \
  X(fp8, 8)             \
  X(affine4, 4)         \
  X(affine8, 8)         \
  X(kivi2, 2)           \
  X(kivi4, 4)

enum hm_kv_codec {
#define X(name, bits) hm_kv_##name,
  HM_KV_CODECS(X)
#undef X
  hm_kv_codecs
};

#define HM_KV_PAGE 64  // tokens

// h codecs keep a page as tiles of 16 lanes x 32 terms, b * 64 bytes each. Keys: a lane is a token, a term a
// column. Values: a lane is a column, a term a token. So the sum over terms never crosses lanes. A tile is
// its planes one after the other (3 bits: 2 + 1); a plane of w bits is w groups of 16 words, one word a lane,
// and field f of byte i of group j is term (8 / w * j + f) * 4 + i, at bits f * w.
// Tiles of one block of 16 lanes lie side by side. Codes of 8 bits are offset by 128.

static inline int hm_kv_bits(int codec) {
  switch (codec) {
#define X(name, bits) case hm_kv_##name: return bits;
    HM_KV_CODECS(X)
#undef X
  }
  return 0;
}
static inline bool hm_kv_integer(int codec) { return codec >= hm_kv_h2 && codec <= hm_kv_h8; }
static inline bool hm_kv_turbo(int codec) { return codec >= hm_kv_turbo2 && codec <= hm_kv_turbo4; }
static inline bool hm_kv_affine(int codec) { return codec == hm_kv_affine4 || codec == hm_kv_affine8; }
static inline bool hm_kv_kivi(int codec) { return codec == hm_kv_kivi2 || codec == hm_kv_kivi4; }
static inline bool hm_kv_rotated(int codec) { return codec >= hm_kv_h2 && codec <= hm_kv_turbo4; }

// Integer codebooks of 2, 3 and 4 bits: near Lloyd-Max's for a normal distribution times kappa, and the relative
// square error they leave of one.
struct hm_kv_levels {
  int8_t level[16];
  float kappa, error;
};
static const hm_kv_levels hm_kv_tables[3] = {
    {{-90, -27, 27, 90}, 59.59375f, 0.117482f},
    {{-88, -55, -31, -10, 10, 31, 55, 88}, 40.90625f, 0.034549f},
    {{-104, -79, -62, -48, -36, -25, -15, -5, 5, 15, 25, 36, 48, 62, 79, 104}, 38.140625f, 0.009506f},
};

// What the columns of a head must be for a codec, or nullptr where d is. All of them: a multiple of 32.
static inline const char* hm_kv_refuses(int codec, int64_t d) {
  if (hm_kv_integer(codec) && (d & (d - 1)) != 0) return "a power of two";
  if (hm_kv_turbo(codec) && d != 64 && d != 128 && d != 256) return "64, 128 or 256, for which mlx-swift-lm has codebooks";
  if (hm_kv_affine(codec) && d % 64 != 0) return "a multiple of 64";
  return nullptr;
}

// Bytes of the codes of a page, where the scales begin. d: columns of a head.
static inline int64_t hm_kv_code_bytes(int codec, int64_t d) {
  const int64_t row = hm_kv_turbo(codec) ? (d * hm_kv_bits(codec) + 31) / 32 * 4 : d * hm_kv_bits(codec) / 8;
  return HM_KV_PAGE * row;
}
// Bytes of a page of one head and side. Scales: h f16, turbo f32, affine and kivi pairs of two 16-bit numbers.
static inline int64_t hm_kv_page_bytes(int codec, int64_t d) {
  int64_t scales = 0;
  if (hm_kv_integer(codec)) scales = HM_KV_PAGE * 2;
  if (hm_kv_turbo(codec)) scales = HM_KV_PAGE * 4;
  if (hm_kv_affine(codec)) scales = HM_KV_PAGE * d / 64 * 4;
  if (hm_kv_kivi(codec)) scales = HM_KV_PAGE * d / 32 * 4;  // keys and values alike
  return hm_kv_code_bytes(codec, d) + scales;
}
