// Pages as other software stores keys and values: between f32 rows [HM_KV_PAGE, d] and bytes. Attention
// over them is on f32 rows, so what counts here is few operations a number. One rounding an operation: every
// ISA has the same bits.
//
// A page is the codes of each token, a bit stream that starts with the lowest bit, then
//   turbo   f32 norm [HM_KV_PAGE]
//   affine  bf16 scale [HM_KV_PAGE, d / 64], bf16 bias alike
//   kivi    f16 scale, f16 least number: keys [HM_KV_PAGE / 32, d], values [HM_KV_PAGE, d / 32]
#pragma once
#include "dequantize.h"
#include "hadamard.h"

namespace hm {
namespace {

// mlx-swift-lm's codebooks of 2, 3 and 4 bits for 64, 128 and 256 columns: Lloyd-Max for a coordinate of a
// random unit vector, as found there on a grid, so a negative number is not quite its positive's.
const float kTurboTables[3][28] = {
    {-0.18745463f, -0.05649366f, 0.05649367f,  0.18745449f,  -0.26375133f, -0.16599470f, -0.09368263f,
     -0.03040462f, 0.03040464f,  0.09368261f,  0.16599482f,  0.26375186f,  -0.32913971f, -0.25096416f,
     -0.19681059f, -0.15295772f, -0.11478586f, -0.08000945f, -0.04726735f, -0.01563822f, 0.01563822f,
     0.04723797f,  0.07994876f,  0.11472529f,  0.15289739f,  0.19675052f,  0.25090477f,  0.32908401f},
    {-0.13302007f, -0.03998107f, 0.03998102f,  0.13302033f,  -0.18828832f, -0.11801215f, -0.06648001f,
     -0.02156330f, 0.02156329f,  0.06648005f,  0.11801218f,  0.18828897f,  -0.23639172f, -0.17934021f,
     -0.14023653f, -0.10881814f, -0.08157559f, -0.05678632f, -0.03350975f, -0.01108178f, 0.01108178f,
     0.03350975f,  0.05678631f,  0.08157560f,  0.10881804f,  0.14023650f,  0.17934017f,  0.23639278f},
    {-0.09420358f, -0.02827190f, 0.02827190f,  0.09420330f,  -0.13371243f, -0.08361249f, -0.04704370f,
     -0.01524900f, 0.01524901f,  0.04704368f,  0.08361248f,  0.13371260f,  -0.16852295f, -0.12754069f,
     -0.09961203f, -0.07719406f, -0.05781249f, -0.04021866f, -0.02370371f, -0.00783269f, 0.00783269f,
     0.02370371f,  0.04021868f,  0.05781246f,  0.07719407f,  0.09961203f,  0.12754090f,  0.16852276f},
};
inline const float* turbo_table(int bits, int64_t d) {
  return kTurboTables[d == 64 ? 0 : d == 128 ? 1 : 2] + (1 << bits) - 4;
}

// n codes, a multiple of 8, to a bit stream.
inline void pack_codes(const uint8_t* code, int64_t n, int bits, uint8_t* p) {
  for (int64_t i = 0; i < n; i += 8, p += bits) {
    uint64_t word = 0;
    for (int j = 0; j < 8; ++j) word |= uint64_t(code[i + j]) << (bits * j);
    memcpy(p, &word, size_t(bits));
  }
}

// ---- encode

inline void turbo_codes(const KvSide& s, int bits, const float* x, uint8_t* code, uint8_t* norms) {
  const float* table = turbo_table(bits, s.d);
  alignas(64) float y[kMostHeadDim], below[kMostHeadDim];  // below: middles between centroids, how many
  for (int64_t t = 0; t < HM_KV_PAGE; ++t, x += s.d, code += s.d) {
    double squares = 0;
    for (int64_t c = 0; c < s.d; ++c) squares += double(x[c]) * x[c];
    const float norm = float(sqrt(squares)), inverse = norm > 1e-8f ? 1 / norm : 0;
    for (int64_t c = 0; c < s.d; ++c) y[c] = x[c] * (inverse * s.signs[c]);
    walsh_hadamard(y, s.d);
    scaled(y, y, s.d, false);
    for (int64_t c = 0; c < s.d; ++c) below[c] = 0;
    for (int i = 0; i + 1 < 1 << bits; ++i) {
      const float middle = (table[i] + table[i + 1]) / 2;
      for (int64_t c = 0; c < s.d; ++c) below[c] += y[c] > middle ? 1.0f : 0.0f;
    }
    for (int64_t c = 0; c < s.d; ++c) code[c] = uint8_t(below[c]);
    memcpy(norms + 4 * t, &norm, 4);
  }
}

// Codes of 32 or 64 numbers that share scale and bias, `stride` apart. scale is not 0.
inline void linear_codes(const float* x, int n, int64_t stride, float scale, float bias, int bits, uint8_t* code) {
  const float most = float((1 << bits) - 1);
  for (int64_t i = 0; i < n * stride; i += stride) {
    const float c = rintf((x[i] - bias) / scale);
    code[i] = uint8_t(c > 0 ? c < most ? c : most : 0);
  }
}

struct Range {
  float least, most;
};
inline Range range_of(const float* x, int n, int64_t stride) {
  Range r = {x[0], x[0]};
  for (int64_t i = stride; i < n * stride; i += stride) {
    r.least = x[i] < r.least ? x[i] : r.least;
    r.most = x[i] > r.most ? x[i] : r.most;
  }
  return r;
}

// As mx.quantize: the end farther from 0 is a multiple of the scale, and codes are of scale and bias before
// these are rounded.
inline void affine_codes(const KvSide& s, int bits, const float* x, uint8_t* code, uint8_t* scales) {
  const int64_t groups = HM_KV_PAGE * s.d / 64;
  for (int64_t g = 0; g < groups; ++g, x += 64, code += 64) {
    const Range r = range_of(x, 64, 1);
    const bool below = fabsf(r.least) > fabsf(r.most);
    const float edge = below ? r.least : r.most, step = (r.most - r.least) / float((1 << bits) - 1);
    float scale = step > 1e-7f ? step : 1e-7f, bias = 0;
    if (!below) scale = -scale;
    const float steps = rintf(edge / scale);
    if (steps != 0) {
      scale = edge / steps;
      bias = edge;
    }
    linear_codes(x, 64, 1, scale, bias, bits, code);
    store1(scales, g, scale, kBf16);
    store1(scales, groups + g, bias, kBf16);
  }
}

inline float as_f16(float x) { return f16_to_f32(f32_to_f16(x > 65504 ? 65504 : x < -65504 ? -65504 : x)); }

// KIVI: keys share a scale along 32 tokens, values along 32 columns.
inline void kivi_codes(const KvSide& s, int bits, const float* x, uint8_t* code, uint8_t* scales) {
  const int64_t groups = HM_KV_PAGE * s.d / 32, stride = s.values ? 1 : s.d;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = s.values ? g * 32 : g / s.d * 32 * s.d + g % s.d;
    const Range r = range_of(x + first, 32, stride);
    const float least = as_f16(r.least + 0.0f);  // never -0
    const float scale = as_f16((r.most - least) / float((1 << bits) - 1));
    linear_codes(x + first, 32, stride, scale != 0 ? scale : 1, least, bits, code + first);
    store1(scales, g, scale, kF16);
    store1(scales, groups + g, least, kF16);
  }
}

// Nearest E4M3, ties to even, beyond 448 the largest.
inline uint8_t f32_to_e4m3(float x) {
  const uint32_t u = f32_to_bits(x), sign = u >> 24 & 0x80;
  const float size = bits_to_f32(u & 0x7fffffff);
  if (size >= 448) return uint8_t(sign | 0x7e);
  // below 2^-6 codes are multiples of 2^-9: adding 2^14 leaves them in the last bits
  if (size < 0x1p-6f) return uint8_t(sign | (f32_to_bits(size + 0x1p14f) - f32_to_bits(0x1p14f)));
  const uint32_t rounded = ((u & 0x7fffffff) + 0x7ffff + (u >> 20 & 1)) >> 20;
  return uint8_t(sign | (rounded - (120 << 3)));
}

// x f32[HM_KV_PAGE, d] -> page.
inline void kv_peer_store(const KvSide& s, const float* x, uint8_t* page) {
  const int64_t n = HM_KV_PAGE * s.d;
  if (s.codec == hm_kv_bf16) return narrow(x, page, n, kBf16);
  if (s.codec == hm_kv_fp8) {
    for (int64_t i = 0; i < n; ++i) page[i] = f32_to_e4m3(x[i] / s.scale);
    return;
  }
  uint8_t code[HM_KV_PAGE * kMostHeadDim];
  uint8_t* scales = page + hm_kv_code_bytes(s.codec, s.d);
  const int bits = hm_kv_bits(s.codec);
  if (hm_kv_turbo(s.codec)) turbo_codes(s, bits, x, code, scales);
  if (hm_kv_affine(s.codec)) affine_codes(s, bits, x, code, scales);
  if (hm_kv_kivi(s.codec)) kivi_codes(s, bits, x, code, scales);
  pack_codes(code, n, bits, page);
}

// ---- decode, a row at a time

template <int kBits>
inline void turbo_row(const KvSide& s, const uint8_t* page, const uint8_t* scales, int64_t t, float* x) {
  uint8_t code[kMostHeadDim];
  unpack<kBits>(page + t * s.d * kBits / 8, code, int(s.d));
  const float norm = load1(scales, t, kF32);
  const float* table = turbo_table(kBits, s.d);
  float row[16] = {};
  for (int i = 0; i < 1 << kBits; ++i) row[i] = norm * table[i];
  for (int64_t c = 0; c < s.d; c += kLanes) store(x + c, lookup16(row, code + c));
}

// x = scale * code + bias for groups of columns.
template <int kBits, int kGroup, Dtype kScale>
inline void linear_row(const KvSide& s, const uint8_t* page, const uint8_t* scales, int64_t t, float* x) {
  uint8_t code[kMostHeadDim];
  unpack<kBits>(page + t * s.d * kBits / 8, code, int(s.d));
  const int64_t groups = s.d / kGroup;
  for (int64_t g = 0; g < groups; ++g) {
    const float scale = load1(scales, t * groups + g, kScale);
    const float bias = load1(scales, (HM_KV_PAGE + t) * groups + g, kScale);
    for (int i = 0; i < kGroup; ++i) x[g * kGroup + i] = scale * float(code[g * kGroup + i]) + bias;
  }
}

template <int kBits>
inline void kivi_key_row(const KvSide& s, const uint8_t* page, const uint8_t* scales, int64_t t, float* x) {
  uint8_t code[kMostHeadDim];
  float scale[kMostHeadDim], least[kMostHeadDim];
  unpack<kBits>(page + t * s.d * kBits / 8, code, int(s.d));
  const uint8_t* mine = scales + t / 32 * s.d * 2;
  widen(mine, scale, s.d, kF16);
  widen(mine + HM_KV_PAGE / 32 * s.d * 2, least, s.d, kF16);
  for (int64_t c = 0; c < s.d; ++c) x[c] = scale[c] * float(code[c]) + least[c];
}

// E4M3 has f16's form with fewer bits, 2^8 apart, subnormals included.
inline void fp8_row(const KvSide& s, const uint8_t* code, float* x) {
  uint16_t half[kMostHeadDim];
  for (int64_t c = 0; c < s.d; ++c) half[c] = uint16_t((code[c] & 0x80) << 8 | (code[c] & 0x7f) << 7);
  const Vec scale = splat(s.scale * 256);
  for (int64_t c = 0; c < s.d; c += kLanes) store(x + c, mul(load_f16(half + c), scale));
}

// page -> x f32[tokens, width], the columns from d on zero; turbo: in the rotated basis, y = H(signs * x) / sqrt(d).
inline void kv_peer_load(const KvSide& s, const uint8_t* page, int64_t tokens, float* x, int64_t width) {
  const uint8_t* scales = page + hm_kv_code_bytes(s.codec, s.d);
  for (int64_t t = 0; t < tokens; ++t, x += width) {
    switch (s.codec) {
      case hm_kv_turbo2: turbo_row<2>(s, page, scales, t, x); break;
      case hm_kv_turbo3: turbo_row<3>(s, page, scales, t, x); break;
      case hm_kv_turbo4: turbo_row<4>(s, page, scales, t, x); break;
      case hm_kv_fp8: fp8_row(s, page + t * s.d, x); break;
      case hm_kv_affine4: linear_row<4, 64, kBf16>(s, page, scales, t, x); break;
      case hm_kv_affine8: linear_row<8, 64, kBf16>(s, page, scales, t, x); break;
      case hm_kv_kivi2:
        if (s.values) linear_row<2, 32, kF16>(s, page, scales, t, x);
        else kivi_key_row<2>(s, page, scales, t, x);
        break;
      case hm_kv_kivi4:
        if (s.values) linear_row<4, 32, kF16>(s, page, scales, t, x);
        else kivi_key_row<4>(s, page, scales, t, x);
        break;
      default: widen(page + t * s.d * 2, x, s.d, kBf16);
    }
    for (int64_t c = s.d; c < width; ++c) x[c] = 0;
  }
}

}  // namespace
}  // namespace hm
