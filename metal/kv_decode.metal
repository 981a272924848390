// Pages to the rows they stand for, rotation undone: a simdgroup has one token at a time. Meaning: kv_ops.kv_decode,
// bit for bit.
#include "kv_codec.metal"
#include "kv_level.metal"
#include "kv_row.metal"

namespace hm {

// The code of a token's column.
template <int CODEC, int VALUES, int D>
METAL_FUNC uint code_at(const device uint* page, uint token, uint column) {
  constexpr uint BITS = code_bits(CODEC);
  if constexpr (is_ours(CODEC)) {
    const uint lane = VALUES ? column : token, term = VALUES ? token : column, chunks = VALUES ? 2 : D / 32;
    const uint quad = term % 32 / 4, byte = 8 * (term % 4);
    const device uint* tile = page + (lane / 16 * chunks + term / 32) * BITS * 16 + lane % 16;
    if (BITS == 3) return (tile[quad / 4 * 16] >> (byte + quad % 4 * 2) & 3u) | (tile[32] >> (byte + quad) & 1u) << 2;
    return tile[quad * BITS / 8 * 16] >> (byte + quad % (8 / BITS) * BITS) & ((1u << BITS) - 1u);
  } else {
    const uint bit = (token * D + column) * BITS, shift = bit % 32;
    uint code = page[bit / 32] >> shift;
    if (shift + BITS > 32) code |= page[bit / 32 + 1] << (32 - shift);
    return code & ((1u << BITS) - 1u);
  }
}

METAL_FUNC float from_e4m3(uint code, float scale) {  // a half with fewer bits, 2^8 too small
  if ((code & 0x7fu) == 0x7fu) return as_type<float>(0x7fc00000u);
  return float(as_type<half>(ushort((code & 0x80u) << 8 | (code & 0x7fu) << 7))) * (scale * 256.0f);
}

// Of rotated codecs in their basis. scale: of fp8; of our codecs, what a level is worth of a row's scale.
template <int CODEC, int VALUES, int D>
METAL_FUNC float number_at(const device uint* page, const device float* book, float scale, uint token, uint column) {
  const device uint* scales = page + code_words(CODEC, D);
  const uint code = code_at<CODEC, VALUES, D>(page, token, column);
  if constexpr (is_ours(CODEC)) {
    const float unit = half_at(scales, token) * scale;
    return level<code_bits(CODEC)>(code) * unit;
  } else if constexpr (is_turbo(CODEC)) {
    return as_type<float>(scales[token]) * book[code];
  } else if constexpr (CODEC == kv_fp8) {
    return from_e4m3(code, scale);
  } else if constexpr (CODEC == kv_bf16) {
    return as_type<float>(code << 16);
  } else if constexpr (is_affine(CODEC)) {
    const uint i = token * (D / 64) + column / 64;
    const float product = bfloat_at(scales, i) * float(code);
    return product + bfloat_at(scales, PAGE * (D / 64) + i);
  } else {
    const uint i = VALUES ? token * (D / 32) + column / 32 : token / 32 * D + column;
    const float product = half_at(scales, i) * float(code);
    return product + half_at(scales, i + (VALUES ? PAGE * (D / 32) : 2 * D));
  }
}

// Pages [p, bytes] to rows [p, 64, D]. SCALE: of fp8; ROOT: 1 / sqrt(D); both a float's bits.
template <int CODEC, int VALUES, int PAGES, int D, int SCALE, int ROOT, int THREADS, class T>
METAL_FUNC void kv_decode(const device uchar* pages, const device float* signs, const device float* book, device T* rows,
                          Place at) {
  constexpr int N = D / 32;
  const uint unit = at.group.x * (THREADS / 32) + at.simd, p = unit / (PAGE / 4);
  if (p >= PAGES) return;
  const device uint* page = (const device uint*)pages + ulong(p) * page_words(CODEC, D);
  float scale = as_type<float>(SCALE);
  if (is_ours(CODEC)) scale = CODEC == kv_h8 ? 1.0f : as_type<float>(ROOT) / kappa(code_bits(CODEC));
  for (uint token = unit % (PAGE / 4) * 4, end = token + 4; token < end; token++) {
    float x[N];
    for (int i = 0; i < N; i++) x[i] = number_at<CODEC, VALUES, D>(page, book, scale, token, at.lane + 32 * i);
    if (is_ours(CODEC) || is_turbo(CODEC)) {
      walsh_hadamard<N>(x, at.lane);
      for (int i = 0; i < N; i++) x[i] = x[i] * as_type<float>(ROOT) * signs[at.lane + 32 * i];
    }
    for (int i = 0; i < N; i++) rows[(ulong(p) * PAGE + token) * D + at.lane + 32 * i] = T(x[i]);
  }
}

}  // namespace hm
