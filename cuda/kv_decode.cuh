// A row of a page to the numbers it stands for, rotation undone: a warp has one at a time. Meaning: kv_ops.kv_decode,
// bit for bit.
#pragma once
#include "kv_codec.cuh"
#include "kv_row.cuh"

namespace hm {

// The code of a token's column.
template <int D>
__device__ inline uint code_at(const Side& side, const uint* page, uint token, uint column) {
  const uint bits = code_bits(side.codec), most = (1u << bits) - 1u;
  if (is_ours(side.codec)) {
    const uint lane = side.values ? column : token, term = side.values ? token : column, chunks = side.values ? 2 : D / 32;
    const uint quad = term % 32 / 4, byte = 8 * (term % 4);
    const uint* tile = page + (lane / 16 * chunks + term / 32) * bits * 16 + lane % 16;
    if (bits == 3) return (tile[quad / 4 * 16] >> (byte + quad % 4 * 2) & 3u) | (tile[32] >> (byte + quad) & 1u) << 2;
    return tile[quad * bits / 8 * 16] >> (byte + quad % (8 / bits) * bits) & most;
  }
  const uint bit = (token * D + column) * bits, shift = bit % 32;
  uint code = page[bit / 32] >> shift;
  if (shift + bits > 32) code |= page[bit / 32 + 1] << (32 - shift);
  return code & most;
}

// Of rotated codecs in their basis.
template <int D>
__device__ inline float number_at(const Side& side, const uint* page, uint token, uint column) {
  const uint* scales = page + code_words(side.codec, D);
  const uint code = code_at<D>(side, page, token, column);
  switch (side.codec) {
    case kv_bf16: return from_bf16(code);
    case kv_fp8: return from_e4m3(code) * side.scale;
    case kv_turbo2:
    case kv_turbo3:
    case kv_turbo4: return __fmul_rn(__uint_as_float(scales[token]), side.book[code]);
    case kv_affine4:
    case kv_affine8: {
      const uint i = token * (D / 64) + column / 64;
      return fmaf(bfloat_at(scales, i), float(code), bfloat_at(scales, PAGE * (D / 64) + i));  // the product is exact
    }
    case kv_kivi2:
    case kv_kivi4: {
      const uint i = side.values ? token * (D / 32) + column / 32 : token / 32 * D + column;
      return fmaf(half_at(scales, i), float(code), half_at(scales, i + (side.values ? PAGE * (D / 32) : 2 * D)));
    }
  }
  const float root = root_of(D), scale = half_at(scales, token);
  if (side.codec == kv_h8) return __fmul_rn(float(int(code) - 128), scale);
  const float unit = scale * __fdiv_rn(root, kappa(code_bits(side.codec)));
  const float l = side.codec == kv_h2 ? level<2>(code) : side.codec == kv_h3 ? level<3>(code) : level<4>(code);
  return __fmul_rn(l, unit);
}

// Row `token` of a page to rows[at ..].
template <int D>
__device__ inline void decode_row(const Side& side, const uint* page, uint token, void* rows, size_t at, int dtype) {
  constexpr int N = D / 32;
  float x[N];
  EACH(i, N) x[i] = number_at<D>(side, page, token, lane_index() + 32 * i);
  if (is_turned(side.codec)) {
    const float root = root_of(D);
    walsh_hadamard<N>(x);
    EACH(i, N) x[i] = x[i] * root * side.signs[lane_index() + 32 * i];
  }
  EACH(i, N) store_number(rows, at + lane_index() + 32 * i, dtype, x[i]);
}

}  // namespace hm
