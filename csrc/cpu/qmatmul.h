// y[t, n] = sum_k x[t, k] * ( scale[n, g] * table[code[n, k]] + bias[n, g] ),  g = k / group: rows of codes
// times tokens.
//
// Every format arrives here as a block of rows with one instance (QmatmulTask). A call owns rows [begin, end)
// for all of the task's tokens: weights stream past once, in order, while the tokens sit in L1. Memory is the
// limit, so a row of codes is unpacked once for up to four tokens.
//
// This file: plain bf16, f16 and f32 rows, and codes as f32 lanes where there is no byte dot product:
//
//   8 codes of the bit stream -> one word shifted into lanes -> f32, by table or as they are -> multiply-add
//
// AVX-512 has kernels of its own: qmatmul_avx512.h. The order of additions over a row depends only on the
// column, never on how many tokens or rows share a call.
#pragma once

#if HM_ISA_AVX512
#include "qmatmul_avx512.h"
#endif

namespace hm {
namespace {

#if !HM_ISA_AVX512
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

// ---- codes to f32 lanes

// Two GGUF blocks: a scale byte, then byte j holds code j below and code j + 16 above.
inline void unpack_gguf(const uint8_t* p, uint8_t* out) {
  for (int b = 0; b < 2; ++b)
    for (int j = 0; j < 16; ++j) {
      out[32 * b + j] = p[17 * b + 1 + j] & 15;
      out[32 * b + 16 + j] = p[17 * b + 1 + j] >> 4;
    }
}

// Where the values of codes come from.
struct Values {
  float table[16];  // repeated after 2^bits entries
  // Codes count from their middle: code * x and bias * sum(x) are often large and cancel. shift is what that
  // leaves to the bias, in scales.
  float offset, shift;
};

inline Values plan_values(const QmatmulTask& task) {
  Values v{};
  float entry[16];
  for (int i = 0; i < 16; ++i) entry[i] = 0.5f * float(e2m1_doubled[i]);
  if (task.table == hm_codebook) memcpy(entry, task.codebook, size_t(4) << task.bits);
  if (task.bits <= 4)
    for (int i = 0; i < 16; ++i) v.table[i] = entry[i & ((1 << task.bits) - 1)];
  if (task.table == hm_linear || task.table == hm_linear_signed) v.offset = -float(1 << (task.bits - 1));
  if (task.table == hm_linear) v.shift = -v.offset;
  return v;
}

constexpr int kGguf = 0;  // in the place of bits

// Eight weights before their scale: codes first.. of the 64 at p.
template <int kBits, bool kLooksUp>
inline void weights8(const Values& values, const uint8_t* p, int first, Vec* w) {
  if constexpr (kBits == kGguf) {
    for (int i = 0; i < 8 / kLanes; ++i) w[i] = lookup16(values.table, p + first + i * kLanes);
  } else if constexpr (kLooksUp) {
    table8<kBits>(values.table, p + first / 8 * kBits, w);
  } else {
    codes8<kBits>(p + first / 8 * kBits, w);
    for (int i = 0; i < 8 / kLanes; ++i) w[i] = add(w[i], splat(values.offset));
  }
}

inline float load_scale(const uint8_t* row, int64_t g, int type) {
  return type == hm_e8m0 ? e8m0_to_f32(row[g]) : load1(row, g, Dtype(type));
}

// The sum of 32 products, codes first .. first + 31 of the 64 at p times the x of each token.
template <int kCount, int kBits, bool kLooksUp>
inline void dot32(const Values& values, const uint8_t* p, int first, const float* const* x, Vec* sums) {
  constexpr int kVecs = 32 / kLanes;
  Vec w[kVecs];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) weights8<kBits, kLooksUp>(values, p, first + 8 * j, w + 8 * j / kLanes);
#pragma GCC unroll 4
  for (int t = 0; t < kCount; ++t) {
    Vec even = mul(w[0], load(x[t])), odd = mul(w[1], load(x[t] + kLanes));
#pragma GCC unroll 4
    for (int i = 2; i < kVecs; i += 2) {
      even = fma(w[i], load(x[t] + i * kLanes), even);
      odd = fma(w[i + 1], load(x[t] + (i + 1) * kLanes), odd);
    }
    sums[t] = add(even, odd);
  }
}

// One row, up to four tokens. Every 32 products are scaled by themselves: a multiply-add more where groups are
// longer, but sums never leave registers.
template <int kCount, int kBits, bool kLooksUp>
void code_tile(const QmatmulTask& task, const Values& values, int64_t n, int64_t first) {
  const float *x[kCount], *sums[kCount];
  Vec row[kCount], part[kCount];
  float shift[kCount];
#pragma GCC unroll 4
  for (int t = 0; t < kCount; ++t) {
    x[t] = task.tokens[first + t]->x;
    sums[t] = task.tokens[first + t]->sums;
    row[t] = zero();
    shift[t] = 0;
  }
  const uint8_t* p = task.codes + n * task.row_bytes;
  const uint8_t* scale = kBits == kGguf ? nullptr : task.scale + n * task.scale_stride;
  const uint8_t* bias = task.bias ? task.bias + n * task.scale_stride : nullptr;
  const int64_t blocks = (task.columns + 31) / 32, per_group = (task.group + 31) / 32;
  int64_t g = 0, left = 0;
  float s = 0, b = 0;
  uint8_t copy[64] = {}, bytes[64];
  const uint8_t* from = p;
  for (int64_t block = 0; block < blocks; ++block) {
    const int half = int(block & 1);
    if (half == 0) {
      from = p;
      if (task.codes_end - p < 64) {  // 64 codes are read as 64 bytes
        from = copy;
        if (int64_t size = task.codes_end - p; size > 0) memcpy(copy, p, size_t(size));
      }
      if (kBits == kGguf) {
        unpack_gguf(from, bytes);
        from = bytes;
      }
    }
    if (kBits == kGguf) {
      s = e8m0_to_f32(p[17 * half]);
    } else if (left-- == 0) {
      s = load_scale(scale, g, task.scale_type);
      b = (bias ? load_scale(bias, g, task.scale_type) : 0.0f) + s * values.shift;
      ++g;
      left = per_group - 1;
    }
    dot32<kCount, kBits, kLooksUp>(values, from, 32 * half, x, part);
#pragma GCC unroll 4
    for (int t = 0; t < kCount; ++t) {
      row[t] = fma(part[t], splat(s), row[t]);
      shift[t] += b * sums[t][block];
      x[t] += 32;
    }
    p += half * (kBits == kGguf ? 34 : 8 * kBits);
  }
  for (int t = 0; t < kCount; ++t)
    store1(task.out[first + t], n, sum(row[t]) + shift[t], Dtype(task.out_type));
}

template <int kBits, bool kLooksUp = false>
void code_rows(const QmatmulTask& task, int64_t begin, int64_t end) {
  const Values values = plan_values(task);
  for (int64_t n = begin; n < end; ++n) {
    int64_t t = 0;
    for (; t + kTokens <= task.token_count; t += kTokens) code_tile<kTokens, kBits, kLooksUp>(task, values, n, t);
    for (; t < task.token_count; ++t) code_tile<1, kBits, kLooksUp>(task, values, n, t);
  }
}

void qmatmul_quantized(const QmatmulTask& task, int64_t begin, int64_t end) {
  if (task.table == hm_e2m1_gguf) return code_rows<kGguf, true>(task, begin, end);
  const bool looks_up = task.table == hm_codebook || task.table == hm_e2m1;
  switch (task.bits) {
    case 2: return looks_up ? code_rows<2, true>(task, begin, end) : code_rows<2>(task, begin, end);
    case 3: return looks_up ? code_rows<3, true>(task, begin, end) : code_rows<3>(task, begin, end);
    case 4: return looks_up ? code_rows<4, true>(task, begin, end) : code_rows<4>(task, begin, end);
    case 5: return code_rows<5>(task, begin, end);
    case 6: return code_rows<6>(task, begin, end);
    default: return code_rows<8>(task, begin, end);
  }
}
void qmatmul_plain(const QmatmulTask& task, int64_t begin, int64_t end) {
  if (task.scale_type == hm_f32) return plain_rows<hm_f32>(task, begin, end);
  if (task.scale_type == hm_f16) return plain_rows<hm_f16>(task, begin, end);
  plain_rows<hm_bf16>(task, begin, end);
}
#endif

void qmatmul(const QmatmulTask& task, int64_t begin, int64_t end) {
  task.table == hm_plain ? qmatmul_plain(task, begin, end) : qmatmul_quantized(task, begin, end);
}

// ---- tokens

// Tokens as f32, and what the kernels for codes want beside them.
void qmatmul_prepare(const QmatmulPrepare& task, int64_t begin, int64_t end) {
  const int64_t padded = (task.columns + 255) / 256 * 256;
  for (int64_t i = begin; i < end; ++i) {
    QmatmulInput& in = task.inputs[i];
    widen(task.x + i * task.columns * (task.x_type == hm_f32 ? 4 : 2), in.x, task.columns,
          Dtype(task.x_type));
    for (int64_t k = task.columns; k < padded; ++k) in.x[k] = 0;
#if HM_ISA_AVX512
    if (task.layouts >> kSpread & 1) to_spread(in.spread, in.x, padded);
    if (task.levels.count) to_fixed_point(task, in, in.x);
#else
    for (int64_t k = 0; k < padded; k += 32) {
      Vec s = zero();
      for (int j = 0; j < 32; j += kLanes) s = add(s, load(in.x + k + j));
      in.sums[k / 32] = sum(s);
    }
#endif
  }
}

}  // namespace
}  // namespace hm
