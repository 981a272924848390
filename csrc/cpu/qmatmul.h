// y[t, n] = sum_k x[t, k] * ( scale[n, g] * table[code[n, k]] + bias[n, g] ),  g = k / group: rows of codes
// times tokens.
//
// Every format arrives here as a block of rows with one instance (QmatmulTask). A call owns rows [begin, end)
// for all of the task's tokens: weights stream past once, in order, while the tokens sit in L1. Memory is the
// limit, so a row of codes is unpacked once for up to four tokens.
//
// This file: plain bf16, f16 and f32 rows on every ISA, and codes as f32 lanes where there is no byte dot
// product:
//
//   64 codes of the bit stream -> u8[64] (shifts in 64-bit words) -> f32 by table -> fused multiply-add
//
// AVX-512 computes codes in integers instead: qmatmul_avx512.h. The order of additions over a row depends
// only on the column, never on how many tokens or rows share a call.
#pragma once

#if HM_ISA_AVX512
#include "qmatmul_avx512.h"
#endif

namespace hm {
namespace {

constexpr int kTokens = 4;  // in one pass over a row

// ---- plain numbers

template <int kType>
inline Vec load_plain(const uint8_t* p) {
  if (kType == hm_f32) {
    float t[kLanes];
    memcpy(t, p, sizeof t);
    return load(t);
  }
  const uint16_t* h = reinterpret_cast<const uint16_t*>(p);
  return kType == hm_f16 ? load_f16(h) : load_bf16(h);
}

// One row; 4 chains of additions a token, or one would wait for the last.
template <int kType, int kCount>
inline void plain_row(const uint8_t* row, int64_t columns, const float* const* x, float* y) {
  constexpr int kSize = kType == hm_f32 ? 4 : 2, kChains = 4;
  Vec sums[kCount][kChains];
  for (int t = 0; t < kCount; ++t)
    for (int i = 0; i < kChains; ++i) sums[t][i] = zero();
  int64_t k = 0;
  for (; k + kChains * kLanes <= columns; k += kChains * kLanes)
    for (int i = 0; i < kChains; ++i) {
      int64_t at = k + i * kLanes;
      Vec w = load_plain<kType>(row + at * kSize);
      for (int t = 0; t < kCount; ++t) sums[t][i] = fma(w, load(x[t] + at), sums[t][i]);
    }
  for (int i = 0; k < columns; k += kLanes, ++i) {
    uint8_t rest[kLanes * kSize] = {};
    int64_t left = columns - k < kLanes ? columns - k : kLanes;
    memcpy(rest, row + k * kSize, size_t(left * kSize));
    Vec w = load_plain<kType>(rest);
    for (int t = 0; t < kCount; ++t) sums[t][i] = fma(w, load(x[t] + k), sums[t][i]);
  }
  for (int t = 0; t < kCount; ++t) y[t] = sum(add(add(sums[t][0], sums[t][1]), add(sums[t][2], sums[t][3])));
}

template <int kType, int kCount>
inline void plain_tile(const QmatmulTask& task, int64_t n, int64_t first) {
  const float* x[kCount];
  float y[kCount];
  for (int t = 0; t < kCount; ++t) x[t] = task.tokens[first + t]->x;
  plain_row<kType, kCount>(task.codes + n * task.row_bytes, task.columns, x, y);
  for (int t = 0; t < kCount; ++t) store1(task.out[first + t], n, y[t], Dtype(task.out_type));
}

template <int kType>
void plain_rows(const QmatmulTask& task, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    int64_t t = 0;
    for (; t + kTokens <= task.token_count; t += kTokens) plain_tile<kType, kTokens>(task, n, t);
    for (; t < task.token_count; ++t) plain_tile<kType, 1>(task, n, t);
  }
}

#if !HM_ISA_AVX512
// ---- codes to f32 lanes

// 64 codes of kBits bits to bytes. Eight codes fill the low bits of a 64-bit word; each step moves the upper
// half of every field to the upper half of twice the space: 8 codes of b bits -> 2 x 4 -> 4 x 2 -> 8 bytes.
template <int kBits>
inline void unpack64(const uint8_t* p, uint8_t* out) {
  constexpr uint64_t one = (uint64_t(1) << kBits) - 1, two = (uint64_t(1) << 2 * kBits) - 1,
                     four = (uint64_t(1) << 4 * kBits) - 1;
  constexpr uint64_t twos = two | two << 32, ones = (one | one << 16) | (one | one << 16) << 32;
  uint64_t w[8];
  for (int i = 0; i < 8; ++i) memcpy(&w[i], p + i * kBits, 8);
  for (int i = 0; i < 8; ++i) {
    uint64_t v = w[i];
    if (kBits < 8) {
      v = (v & four) | (v >> (4 * kBits) & four) << 32;
      v = (v & twos) | (v >> (2 * kBits) & twos) << 16;
      v = (v & ones) | (v >> kBits & ones) << 8;
    }
    w[i] = v;
  }
  memcpy(out, w, 64);
}

// Two GGUF blocks: a scale byte, then byte j holds code j below and code j + 16 above.
inline void unpack_gguf(const uint8_t* p, uint8_t* out) {
  for (int b = 0; b < 2; ++b)
    for (int j = 0; j < 16; ++j) {
      out[32 * b + j] = p[17 * b + 1 + j] & 15;
      out[32 * b + 16 + j] = p[17 * b + 1 + j] >> 4;
    }
}

struct Unpack {
  void (*unpack)(const uint8_t*, uint8_t*);
  bool looks_up;
  float table[16];
  float offset;
  int64_t stride;  // bytes of 64 codes
};

inline Unpack plan_unpack(const QmatmulTask& task) {
  Unpack u{};
  switch (task.bits) {
    case 2:
      u.unpack = unpack64<2>;
      break;
    case 3:
      u.unpack = unpack64<3>;
      break;
    case 4:
      u.unpack = unpack64<4>;
      break;
    case 5:
      u.unpack = unpack64<5>;
      break;
    case 6:
      u.unpack = unpack64<6>;
      break;
    default:
      u.unpack = unpack64<8>;
  }
  u.stride = 8 * task.bits;
  if (task.table == hm_e2m1_gguf) u.unpack = unpack_gguf, u.stride = 34;
  u.looks_up = task.table == hm_codebook || task.table == hm_e2m1 || task.table == hm_e2m1_gguf;
  if (task.table == hm_codebook)
    memcpy(u.table, task.codebook, size_t(4) << task.bits);
  else
    for (int i = 0; i < 16; ++i) u.table[i] = 0.5f * float(e2m1_doubled[i]);
  if (task.table == hm_linear_signed) u.offset = -float(1 << (task.bits - 1));
  return u;
}

inline float load_scale(const uint8_t* row, int64_t g, int type) {
  return type == hm_e8m0 ? e8m0_to_f32(row[g]) : load1(row, g, Dtype(type));
}

// Adds scale * (products of one group) to a token's lanes, and bias * (sum of its x) to its shift.
template <int kCount>
struct Lanes {
  Vec group[kCount][2], row[kCount];
  float shift[kCount], x[kCount];
};

template <int kCount>
inline void end_group(Lanes<kCount>& v, float scale, float bias) {
  for (int t = 0; t < kCount; ++t) {
    v.row[t] = fma(add(v.group[t][0], v.group[t][1]), splat(scale), v.row[t]);
    v.group[t][0] = v.group[t][1] = zero();
    v.shift[t] = v.shift[t] + bias * v.x[t];
    v.x[t] = 0;
  }
}

// 32 codes, already bytes, at column k.
template <int kCount, bool kLooksUp>
inline void add32(const Unpack& u, const uint8_t* code, const float* const* x, int64_t k, Lanes<kCount>& v) {
  for (int i = 0; i < 32 / kLanes; ++i) {
    Vec w =
        kLooksUp ? lookup16(u.table, code + i * kLanes) : add(from_u8(code + i * kLanes), splat(u.offset));
    for (int t = 0; t < kCount; ++t)
      v.group[t][i & 1] = fma(w, load(x[t] + k + i * kLanes), v.group[t][i & 1]);
  }
}

template <int kCount, bool kLooksUp>
void code_tile(const QmatmulTask& task, const Unpack& u, int64_t n, int64_t first) {
  const float* x[kCount];
  const float* sums[kCount];
  Lanes<kCount> v;
  for (int t = 0; t < kCount; ++t) {
    x[t] = task.tokens[first + t]->x;
    sums[t] = task.tokens[first + t]->sums;
    v.group[t][0] = v.group[t][1] = v.row[t] = zero();
    v.shift[t] = v.x[t] = 0;
  }
  const bool gguf = task.table == hm_e2m1_gguf;
  const uint8_t* p = task.codes + n * task.row_bytes;
  const uint8_t* scale = gguf ? nullptr : task.scale + n * task.scale_stride;
  const uint8_t* bias = task.bias ? task.bias + n * task.scale_stride : nullptr;
  const int64_t blocks = (task.columns + 31) / 32, per_group = (task.group + 31) / 32;
  int64_t g = 0, left = per_group;
  for (int64_t block = 0; block < blocks; block += 2, p += u.stride) {
    uint8_t code[64], copy[64] = {};
    const uint8_t* from = p;
    if (task.codes_end - p < 64) {  // unpacking reads 64 bytes
      from = copy;
      if (int64_t size = task.codes_end - p; size > 0) memcpy(copy, p, size_t(size));
    }
    u.unpack(from, code);
    for (int half = 0; half < 2 && block + half < blocks; ++half) {
      add32<kCount, kLooksUp>(u, code + 32 * half, x, (block + half) * 32, v);
      for (int t = 0; t < kCount; ++t) v.x[t] += sums[t][block + half];
      if (--left && block + half + 1 < blocks) continue;
      float s = gguf ? e8m0_to_f32(p[17 * half]) : load_scale(scale, g, task.scale_type);
      end_group(v, s, bias ? load_scale(bias, g, task.scale_type) : 0.0f);
      ++g;
      left = per_group;
    }
  }
  for (int t = 0; t < kCount; ++t)
    store1(task.out[first + t], n, sum(v.row[t]) + v.shift[t], Dtype(task.out_type));
}

template <bool kLooksUp>
void code_rows(const QmatmulTask& task, int64_t begin, int64_t end) {
  const Unpack u = plan_unpack(task);
  for (int64_t n = begin; n < end; ++n) {
    int64_t t = 0;
    for (; t + kTokens <= task.token_count; t += kTokens) code_tile<kTokens, kLooksUp>(task, u, n, t);
    for (; t < task.token_count; ++t) code_tile<1, kLooksUp>(task, u, n, t);
  }
}

void qmatmul_quantized(const QmatmulTask& task, int64_t begin, int64_t end) {
  bool looks_up = task.table == hm_codebook || task.table == hm_e2m1 || task.table == hm_e2m1_gguf;
  looks_up ? code_rows<true>(task, begin, end) : code_rows<false>(task, begin, end);
}
#endif

void qmatmul(const QmatmulTask& task, int64_t begin, int64_t end) {
  if (task.table != hm_plain) return qmatmul_quantized(task, begin, end);
  if (task.scale_type == hm_f32) return plain_rows<hm_f32>(task, begin, end);
  if (task.scale_type == hm_f16) return plain_rows<hm_f16>(task, begin, end);
  plain_rows<hm_bf16>(task, begin, end);
}

// ---- tokens

// Sums of x over 32 columns, and over the groups that AVX-512's kernels take 16 at a time.
void qmatmul_prepare(const QmatmulPrepare& task, int64_t begin, int64_t end) {
  const int64_t padded = (task.columns + 255) / 256 * 256;
  for (int64_t i = begin; i < end; ++i) {
    QmatmulInput& in = task.inputs[i];
    widen(task.x + i * task.columns * (task.x_type == hm_f32 ? 4 : 2), in.x, task.columns,
          Dtype(task.x_type));
    for (int64_t k = task.columns; k < padded; ++k) in.x[k] = 0;
#if HM_ISA_AVX512
    if (task.folds) {
      to_fixed_point(task, in, in.x);
      continue;
    }
#endif
    for (int64_t k = 0; k < padded; k += 32) {
      Vec s = zero();
      for (int j = 0; j < 32; j += kLanes) s = add(s, load(in.x + k + j));
      in.sums[k / 32] = sum(s);
    }
  }
}

}  // namespace
}  // namespace hm
