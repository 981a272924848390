// Rows of keys or values to codes: a warp has a row, or, where a column has its own scale (kivi's keys), a thread a column.
// Meaning: kv_ops.kv_encode, bit for bit. A group with a NaN gets a bias of NaN.
#pragma once
#include "kv_codec.cuh"
#include "kv_row.cuh"

namespace hm {

// ---- ours: codes, returns the row's scale
template <int BITS, int N>
__device__ inline float our_row(float* x, const float* signs, float root, uint* codes) {
  float squares = __fmul_rn(x[0], x[0]), dot = 0.0f;  // added in row_sum's order
  HM_UNROLL for (int i = 1; i < N; i++) squares += __fmul_rn(x[i], x[i]);
  EACH(i, N) x[i] *= signs[lane_index() + 32 * i];
  walsh_hadamard<N>(x);
  if constexpr (BITS == 8) {
    EACH(i, N) x[i] *= root;
    const float scale = __fdiv_rn(row_most<N>(x), 127.0f);
    const float stored = __half2float(__float2half_rn(scale > 65504.0f ? 65504.0f : scale));
    EACH(i, N) codes[i] = uint(to_level(stored == 0.0f ? 0.0f : __fdiv_rn(x[i], stored)) + 128);
    return stored;
  } else {
    const float n = __fsqrt_rn(warp_sum(squares)), inverse = n > 0.0f ? __fdiv_rn(1.0f, n) : 0.0f;
    EACH(i, N) {
      x[i] = x[i] * inverse * kappa(BITS);
      codes[i] = 0;
      EACH(m, (1 << BITS) - 1) codes[i] += (level<BITS>(m) + level<BITS>(m + 1)) * 0.5f < x[i];
      const float part = __fmul_rn(x[i], level<BITS>(codes[i]));
      dot = i ? dot + part : part;
    }
    dot = warp_sum(dot);
    const float all = float(32 * N) * kappa(BITS) * kappa(BITS);
    const float scale = n == 0.0f ? 0.0f : __fdiv_rn(n * all, dot > 0.0f ? dot : 1.0f);  // NaN stays
    return scale > 65504.0f ? 65504.0f : scale;
  }
}

// ---- mlx-swift-lm's
struct TwoFloats {  // a sum with the bits f64 would keep
  float high, low;
};
__device__ inline TwoFloats plus(TwoFloats a, TwoFloats b) {
  const float sum = a.high + b.high, part = sum - a.high;
  const float low = (a.low + b.low) + ((a.high - (sum - part)) + (b.high - part)), high = sum + low;
  return TwoFloats{high, low - (high - sum)};
}
// A row's length, rounded once: mlx-swift-lm's codes are held to sums in f64.
template <int N>
__device__ inline float row_length(const float* x) {
  const uint size = __float_as_uint(row_most<N>(x)) >> 23 & 255u, e = size < 1 ? 1 : size > 253 ? 253 : size;
  const float down = __uint_as_float((254u - e) << 23);
  TwoFloats sum{0.0f, 0.0f};
  EACH(i, N) {
    const float v = __fmul_rn(x[i], down), square = __fmul_rn(v, v);
    sum = plus(sum, TwoFloats{square, fmaf(v, v, -square)});
  }
  HM_UNROLL for (int h = 16; h > 0; h /= 2)
    sum = plus(sum, TwoFloats{__shfl_xor_sync(FULL, sum.high, h), __shfl_xor_sync(FULL, sum.low, h)});
  const float root = __fsqrt_rn(sum.high);
  if (!(root > 0.0f)) return root;
  const float rest = fmaf(-root, root, sum.high) + sum.low, more = __fdiv_rn(rest, 2.0f * root);
  return (root + more) * __uint_as_float(e << 23);
}
template <int BITS, int N>
__device__ inline float turbo_row(float* x, const float* signs, float root, const float* book, uint* codes) {
  const float n = row_length<N>(x), inverse = n > 1e-8f ? __fdiv_rn(1.0f, n) : 0.0f;
  EACH(i, N) x[i] = __fmul_rn(x[i], inverse * signs[lane_index() + 32 * i]);
  walsh_hadamard<N>(x);
  EACH(i, N) x[i] *= root, codes[i] = 0;
  EACH(m, (1 << BITS) - 1) {
    const float middle = (book[m] + book[m + 1]) * 0.5f;
    EACH(i, N) codes[i] += x[i] > middle;
  }
  return n;
}

// ---- numbers and lines
__device__ inline bool is_nan(float x) { return (__float_as_uint(x) & 0x7fffffffu) > 0x7f800000u; }
__device__ inline uint to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ inline float as_half(float x) {
  return __half2float(__float2half_rn(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x));
}
__device__ inline uint to_bfloat(float x) {
  const uint u = __float_as_uint(x);
  return is_nan(x) ? 0x7fc0u : (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
}
__device__ inline uint to_e4m3(float x) {
  const uint u = __float_as_uint(x), sign = u >> 24 & 0x80u, size = u & 0x7fffffffu;
  if (is_nan(x)) return 0x7fu;
  if (__uint_as_float(size) >= 448.0f) return sign | 0x7eu;
  // below 2^-6 codes are multiples of 2^-9: adding 2^14 leaves them in the last bits
  if (__uint_as_float(size) < 0.015625f) return sign | (__float_as_uint(__uint_as_float(size) + 16384.0f) - 0x46800000u);
  return sign | (((size + 0x7ffffu + (u >> 20 & 1u)) >> 20) - 960u);
}

struct Line {  // code -> scale * code + bias
  float scale, bias;
};
__device__ inline uint line_code(Line line, float x, float most) {
  const float code = rintf(__fdiv_rn(x - line.bias, line.scale));
  return uint(code > 0.0f ? fminf(code, most) : 0.0f);
}
// affine, as mx.quantize: the end farther from 0 is a multiple of the scale. most: the largest code.
__device__ inline Line line_of(int codec, float least, float largest, float most) {
  if (is_kivi(codec)) {
    const float bias = as_half(least + 0.0f);
    return Line{as_half(__fdiv_rn(largest - bias, most)), bias};
  }
  const bool below = fabsf(least) > fabsf(largest);
  const float edge = below ? least : largest, step = fmaxf(__fdiv_rn(largest - least, most), 1e-7f);
  Line line{below ? step : -step, 0.0f};
  const float steps = rintf(__fdiv_rn(edge, line.scale));
  if (steps != 0.0f) line.scale = __fdiv_rn(edge, steps), line.bias = edge;
  return line;
}
// Stores a line as two 16-bit numbers, the bias behind all scales; a scale of 0 then divides as 1.
__device__ inline void store_line(int codec, Line& line, bool lost, unsigned short* scales, uint i, uint biases) {
  const float bias = lost ? __uint_as_float(0x7fc00000u) : line.bias;
  scales[i] = is_kivi(codec) ? to_half(line.scale) : to_bfloat(line.scale);
  scales[biases + i] = is_kivi(codec) ? to_half(bias) : to_bfloat(bias);
  if (line.scale == 0.0f) line.scale = 1.0f;
}

// Codes of one row. Groups: GROUP registers of all lanes.
template <int GROUP, int N>
__device__ inline void line_row(int codec, const float* x, uint* codes, unsigned short* scales, uint token) {
  const float top = float((1 << code_bits(codec)) - 1);
  EACH(g, N / GROUP) {
    float least = x[g * GROUP], most = least;
    bool lost = is_nan(least);
    HM_UNROLL for (int i = 1; i < GROUP; i++) {
      least = fminf(least, x[g * GROUP + i]), most = fmaxf(most, x[g * GROUP + i]);
      lost = lost || is_nan(x[g * GROUP + i]);
    }
    least = -warp_max(-least), most = warp_max(most);
    lost = __any_sync(FULL, lost);
    Line line = line_of(codec, least, most, top);
    if (lane_index() == 0) store_line(codec, line, lost, scales, token * (N / GROUP) + g, PAGE * (N / GROUP));
    if (line.scale == 0.0f) line.scale = 1.0f;
    EACH(i, GROUP) codes[g * GROUP + i] = line_code(line, x[g * GROUP + i], top);
  }
}

}  // namespace hm
