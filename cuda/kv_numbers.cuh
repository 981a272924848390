// Products of pages that are numbers once they are read (bf16, fp8, codes times scales, raw rows) with f32 numbers: both as
// sums of two bf16 numbers, 16 bits of each, exact where a page's numbers are bf16; f32 sums on tensor cores.
// Rows and columns of sums lie in lanes as in kv_integers.cuh.
#pragma once
#include "kv_codec.cuh"

namespace hm {

struct Source {
  const uint* page;
  const float* book;
  int codec, values;
  uint count;  // tokens there are; others are zeros, and not read
  __device__ bool exact() const { return codec == kv_bf16 || codec == kv_fp8; }
};

template <int COUNT>
__device__ inline void load_floats(const float* from, float* x) {
  EACH(i, COUNT / 4) {
    const float4 v = reinterpret_cast<const float4*>(from)[i];
    x[4 * i] = v.x, x[4 * i + 1] = v.y, x[4 * i + 2] = v.z, x[4 * i + 3] = v.w;
  }
}
// COUNT codes from a bit on.
template <int BITS, int COUNT>
__device__ __forceinline__ void load_codes(const uint* page, uint bit, uint* codes) {
  const uint shift = bit % 32;
  if constexpr (BITS == 8 || BITS == 16) {
    constexpr int WORDS = COUNT * BITS / 32;
    uint words[WORDS];
    if constexpr (WORDS == 4) {
      const uint4 w = *reinterpret_cast<const uint4*>(page + bit / 32);
      words[0] = w.x, words[1] = w.y, words[2] = w.z, words[3] = w.w;
    } else if constexpr (WORDS == 2) {
      const uint2 w = *reinterpret_cast<const uint2*>(page + bit / 32);
      words[0] = w.x, words[1] = w.y;
    } else {
      words[0] = page[bit / 32];
    }
    EACH(i, COUNT) codes[i] = words[i * BITS / 32] >> (i * BITS % 32) & ((1u << BITS) - 1u);
  } else {
    uint word = page[bit / 32] >> shift;
    if (32 % (COUNT * BITS) && shift + COUNT * BITS > 32) word |= page[bit / 32 + 1] << (32 - shift);
    EACH(i, COUNT) codes[i] = word >> (i * BITS) & ((1u << BITS) - 1u);
  }
}

// x[i] = what code i of COUNT, from a column of a token on, stands for: without fp8's scale and turbo's norm.
template <int COUNT, int D>
__device__ __forceinline__ void from_lines(const Source& s, uint token, uint column, const uint* codes, float* x) {
  const uint* scales = s.page + code_words(s.codec, D);
  if (is_affine(s.codec)) {
    const uint i = token * (D / 64) + column / 64;
    const float scale = bfloat_at(scales, i), bias = bfloat_at(scales, PAGE * (D / 64) + i);
    EACH(j, COUNT) x[j] = fmaf(scale, float(codes[j]), bias);
  } else if (s.values) {
    const uint i = token * (D / 32) + column / 32;
    const float scale = half_at(scales, i), bias = half_at(scales, PAGE * (D / 32) + i);
    EACH(j, COUNT) x[j] = fmaf(scale, float(codes[j]), bias);
  } else {
    const uint i = token / 32 * D + column;
    EACH(j, COUNT) x[j] = fmaf(half_at(scales, i + j), float(codes[j]), half_at(scales, 2 * D + i + j));
  }
}
template <int BITS, int COUNT, int D>
__device__ __forceinline__ void load_numbers(const Source& s, uint token, uint column, float* x) {
  if (token >= s.count) {
    EACH(i, COUNT) x[i] = 0.0f;
    return;
  }
  const uint i = token * D + column;
  if constexpr (BITS == 32) {
    load_floats<COUNT>(reinterpret_cast<const float*>(s.page) + i, x);
    return;
  } else {
    uint codes[COUNT];
    load_codes<BITS, COUNT>(s.page, i * BITS, codes);
    if constexpr (BITS == 16) {
      EACH(j, COUNT) x[j] = s.codec == kv_bf16 ? from_bf16(codes[j]) : from_f16(codes[j]);
    } else if (BITS == 8 && s.codec == kv_fp8) {
      EACH(j, COUNT) x[j] = from_e4m3(codes[j]);
    } else if (is_turbo(s.codec)) {
      EACH(j, COUNT) x[j] = s.book[codes[j]];
    } else {
      from_lines<COUNT, D>(s, token, column, codes, x);
    }
  }
}

// Two numbers as words of two bf16: the nearest, then what is left.
__device__ inline uint pack_bf16(float a, float b) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(a)) | uint(__bfloat16_as_ushort(__float2bfloat16_rn(b))) << 16;
}
__device__ inline uint top_halves(float a, float b) { return permute_bytes(__float_as_uint(a), __float_as_uint(b), 0x7632u); }
struct Split {
  uint high, low;
  __device__ Split(float a, float b) : high(pack_bf16(a, b)) {
    low = pack_bf16(a - from_bf16(high & 0xffffu), b - from_bf16(high >> 16));
  }
};

// d += x y over 16 terms: rows x as pairs of numbers x[k][row], columns as words of two bf16.
__device__ __forceinline__ void add_pairs(float* d, const float (*x)[4], bool exact, const uint* high, const uint* low) {
  uint a[4];
  if (exact) {
    EACH(i, 4) a[i] = top_halves(x[0][i], x[1][i]);
    multiply_bfloats(d, a, high), multiply_bfloats(d, a, low);
    return;
  }
  uint rest[4];
  EACH(i, 4) {
    const Split two(x[0][i], x[1][i]);
    a[i] = two.high, rest[i] = two.low;
  }
  multiply_bfloats(d, a, high), multiply_bfloats(d, a, low), multiply_bfloats(d, rest, high);
}

// 8 queries of D floats, query `head` of them null for none, to words [D / 32][high, low][lane][4] of shared memory.
template <int D>
__device__ inline void store_queries(const float* x, uint heads, uint4* queries) {
  for (uint i = threadIdx.x; i < D; i += blockDim.x) {  // (chunk, lane)
    const uint head = i % 32 / 4, column = i / 32 * 32 + i % 4 * 8;
    float v[8] = {};
    if (head < heads) load_eight(x, size_t(head) * D, int(column), D, F32, v);
    const Split a(v[0], v[1]), b(v[2], v[3]), c(v[4], v[5]), d(v[6], v[7]);
    queries[i / 32 * 64 + i % 32] = make_uint4(a.high, b.high, c.high, d.high);
    queries[i / 32 * 64 + 32 + i % 32] = make_uint4(a.low, b.low, c.low, d.low);
  }
}

// 32 tokens of a page times 8 queries.
template <int BITS, int D>
__device__ __forceinline__ void number_sums(const Source& s, uint half, const uint4* queries, float (*sums)[4]) {
  const uint lane = lane_index(), token = 32 * half + lane / 4 * 4, t = lane % 4;
  const bool exact = s.exact();
  EACH(i, 2) EACH(e, 4) sums[i][e] = 0.0f;
#pragma unroll(BITS == 16 ? 2 : 1)
  for (uint c = 0; c < D / 32; c++) {
    float x[4][8];
    EACH(e, 4) load_numbers<BITS, 8, D>(s, token + e, 32 * c + 8 * t, x[e]);
    const uint4 h = queries[64 * c + lane], l = queries[64 * c + 32 + lane];
    const uint high[4] = {h.x, h.y, h.z, h.w}, low[4] = {l.x, l.y, l.z, l.w};
    EACH(i, 2) {
      EACH(k, 2) {
        const float *a = x[2 * i] + 4 * k, *b = x[2 * i + 1] + 4 * k;
        const float pairs[2][4] = {{a[0], b[0], a[2], b[2]}, {a[1], b[1], a[3], b[3]}};
        add_pairs(sums[i], pairs, exact, high + 2 * k, low + 2 * k);
      }
    }
  }
}

// Weights of a run's tokens as two bf16 numbers, [high, low][head][token]; a head's row is padded so that lanes meet
// different banks.
constexpr uint WEIGHT_ROW = 4 * PAGE + 16;

// 32 columns of a page of values, times 8 heads' weights: o += .
template <int BITS, int D>
__device__ __forceinline__ void add_numbers(const Source& s, const unsigned short* weights, uint column, float (*o)[4]) {
  const uint lane = lane_index(), t = lane % 4;
  const bool exact = s.exact();
  const unsigned short* mine = weights + lane / 4 * WEIGHT_ROW + 4 * t;
#pragma unroll(BITS == 16 ? 2 : 1)
  for (uint k = 0; k < PAGE; k += 16) {
    float x[4][4];
    EACH(e, 4) load_numbers<BITS, 4, D>(s, k + 4 * t + e, column + lane / 4 * 4, x[e]);
    const uint2 h = *reinterpret_cast<const uint2*>(mine + k), l = *reinterpret_cast<const uint2*>(mine + 8 * WEIGHT_ROW + k);
    const uint high[2] = {h.x, h.y}, low[2] = {l.x, l.y};
    EACH(i, 2) {
      const float pairs[2][4] = {{x[0][2 * i], x[0][2 * i + 1], x[2][2 * i], x[2][2 * i + 1]},
                                 {x[1][2 * i], x[1][2 * i + 1], x[3][2 * i], x[3][2 * i + 1]}};
      add_pairs(o[i], pairs, exact, high, low);
    }
  }
}

}  // namespace hm
