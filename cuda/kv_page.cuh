// A full page to codes, by a block of D threads: rows to codes, a byte each, in shared memory; then codes to words.
#pragma once
#include "kv_rows.cuh"

namespace hm {

// 64 rows of D numbers. The first `split` lie elsewhere than the rest: raw rows that were there, then new ones.
struct PageRows {
  const char *there, *fresh;  // where row 0 is, were it in that array
  uint split;
  int dtype;
  __device__ PageRows(const void* there, size_t there_at, const void* fresh, size_t fresh_at, uint split, int dtype)
      : there(static_cast<const char*>(there) + there_at * (dtype == F32 ? 4 : 2)),
        fresh(static_cast<const char*>(fresh) + fresh_at * (dtype == F32 ? 4 : 2)),
        split(split),
        dtype(dtype) {}
  template <int D>
  __device__ float at(uint token, uint column) const {
    return load_number(token < split ? there : fresh, token * D + column, dtype);
  }
};

// ---- codes to words
// A word of our tiles. Keys: lanes are tokens, terms columns; values: the other way round.
template <int D>
__device__ inline uint tile_word(const unsigned char* codes, uint bits, bool values, uint w) {
  const uint tile = w / (16 * bits), j = w % (16 * bits) / 16, chunks = values ? 2 : D / 32;
  const uint lane = tile / chunks * 16 + w % 16, first = tile % chunks * 32;
  const uint width = bits == 3 ? (j < 2 ? 2 : 1) : bits, shift = bits == 3 && j == 2 ? 2 : 0;
  const uint quad = first / 4 + (shift ? 0 : j * (8 / width));
  uint word = 0;
  for (uint i = 0; i < 32 / width; i++) {  // field i / 4 of byte i % 4
    const uint term = 4 * quad + i, code = values ? codes[term * D + lane] : codes[lane * D + term];
    word |= (code >> shift & ((1u << width) - 1u)) << (8 * (i % 4) + width * (i / 4));
  }
  return word;
}
// A word of a token's bit stream.
template <int D>
__device__ inline uint stream_word(const unsigned char* codes, uint bits, uint w) {
  const uint row = D * bits / 32, begin = 32 * (w % row), end = begin + 32;
  const unsigned char* from = codes + w / row * D;
  uint word = 0;
  for (uint c = begin / bits; c * bits < end; c++) {
    const int at = int(c * bits) - int(begin);
    word |= at < 0 ? uint(from[c]) >> -at : uint(from[c]) << at;
  }
  return word;
}

// ---- rows to codes
template <int D>
__device__ inline void row_codes(const Side& side, float* x, uint* codes, uint* scales, uint token) {
  constexpr int N = D / 32;
  const float root = root_of(D);
  unsigned short* halves = reinterpret_cast<unsigned short*>(scales);
  float scale = 0.0f;
  switch (side.codec) {
    case kv_h2: scale = our_row<2, N>(x, side.signs, root, codes); break;
    case kv_h3: scale = our_row<3, N>(x, side.signs, root, codes); break;
    case kv_h4: scale = our_row<4, N>(x, side.signs, root, codes); break;
    case kv_h8: scale = our_row<8, N>(x, side.signs, root, codes); break;
    case kv_turbo2: scale = turbo_row<2, N>(x, side.signs, root, side.book, codes); break;
    case kv_turbo3: scale = turbo_row<3, N>(x, side.signs, root, side.book, codes); break;
    case kv_turbo4: scale = turbo_row<4, N>(x, side.signs, root, side.book, codes); break;
    case kv_affine4:
    case kv_affine8: line_row<2, N>(side.codec, x, codes, halves, token); break;
    case kv_kivi2:
    case kv_kivi4: line_row<1, N>(side.codec, x, codes, halves, token); break;
    default: EACH(i, N) codes[i] = to_e4m3(__fdiv_rn(x[i], side.scale));
  }
  if (lane_index() == 0) {
    if (is_ours(side.codec)) halves[token] = to_half(scale);
    if (is_turbo(side.codec)) scales[token] = __float_as_uint(scale);
  }
}
// kivi's keys: 32 tokens of a column have a line.
template <int D>
__device__ inline void column_codes(int codec, const PageRows& rows, unsigned char* codes, uint* scales) {
  const float top = float((1 << code_bits(codec)) - 1);
  const uint c = threadIdx.x;
#pragma unroll 1
  for (uint first = 0; first < PAGE; first += 32) {
    float least = rows.at<D>(first, c), most = least;
    bool lost = is_nan(least);
    for (uint t = first + 1; t < first + 32; t++) {
      const float x = rows.at<D>(t, c);
      least = fminf(least, x), most = fmaxf(most, x), lost = lost || is_nan(x);
    }
    Line line = line_of(codec, least, most, top);
    store_line(codec, line, lost, reinterpret_cast<unsigned short*>(scales), first / 32 * D + c, 2 * D);
    for (uint t = first; t < first + 32; t++) codes[t * D + c] = (unsigned char)line_code(line, rows.at<D>(t, c), top);
  }
}

// codes: 64 D bytes of shared memory. All threads of the block, D of them.
template <int D>
__device__ inline void encode_page(const Side& side, const PageRows& rows, uint* page, unsigned char* codes) {
  constexpr int N = D / 32;
  const uint words = code_words(side.codec, D), bits = code_bits(side.codec);
  uint* scales = page + words;
  if (side.codec == kv_bf16) {
    for (uint i = threadIdx.x; i < words; i += D) {
      const uint token = 2 * i / D, c = 2 * i % D;
      page[i] = to_bfloat(rows.at<D>(token, c)) | to_bfloat(rows.at<D>(token, c + 1)) << 16;
    }
    return;
  }
  if (is_kivi(side.codec) && !side.values) {
    column_codes<D>(side.codec, rows, codes, scales);
  } else {
#pragma unroll 1
    for (uint token = warp_index(); token < PAGE; token += N) {
      float x[N];
      uint found[N];
      EACH(i, N) x[i] = rows.at<D>(token, lane_index() + 32 * i);
      row_codes<D>(side, x, found, scales, token);
      EACH(i, N) codes[token * D + lane_index() + 32 * i] = (unsigned char)found[i];
    }
  }
  __syncthreads();
#pragma unroll 1
  for (uint w = threadIdx.x; w < words; w += D)
    page[w] = is_ours(side.codec) ? tile_word<D>(codes, bits, side.values, w) : stream_word<D>(codes, bits, w);
}

}  // namespace hm
