// y[i, k] = scale[n, k / group] * table[code[n, k]] (+ bias[n, k / group]) for the rows n = index[i] of
// any weight; used for embeddings (one row a token) and to look inside a checkpoint.
//
// Product and sum are rounded one after the other, so every ISA and the numpy reference agree to the
// last bit. A row moves through a small buffer in three steps the compiler vectorises:
//
//   kSpan codes of the bit stream -> u8 | u8 -> f32 by table, scale and bias | f32 -> y's dtype
#pragma once
#include "../core/instances.h"

namespace hm {
namespace {

constexpr int kSpan = 256;  // columns per step: whole bytes of codes at any width

inline float stored_number(const uint8_t* p, int64_t i, hm_scale dtype) {
  return dtype == hm_e8m0 ? e8m0_to_f32(p[i]) : load1(p, i, Dtype(dtype));
}

// n codes of Bits bits, LSB first; reads no byte past the last code's. Loops are written so that compilers do
// many bytes, or many words of 8 codes, at once.
template <int Bits>
inline void unpack(const uint8_t* p, uint8_t* code, int n) {
  const int words = n / 8;
  if constexpr (Bits == 8) {
    memcpy(code, p, size_t(words) * 8);
  } else if constexpr (Bits == 4) {
    for (int i = 0; i < words * 4; ++i) {
      code[2 * i] = p[i] & 15;
      code[2 * i + 1] = p[i] >> 4;
    }
  } else if constexpr (Bits == 2) {
    for (int i = 0; i < words * 2; ++i) {
      const uint32_t b = p[i], four = (b | b << 6 | b << 12 | b << 18) & 0x03030303;
      memcpy(code + 4 * i, &four, 4);
    }
  } else {
    constexpr uint64_t k1 = (1 << Bits) - 1, k2 = k1 | k1 << Bits, k4 = k2 | k2 << 2 * Bits;
    for (int i = 0; i < words; ++i) {
      uint64_t w = 0;
      for (int j = 0; j < Bits; ++j) w |= uint64_t(p[i * Bits + j]) << 8 * j;
      w = (w & k4) | (w & k4 << 4 * Bits) << (32 - 4 * Bits);
      w = (w & k2 * 0x100000001) | (w & (k2 * 0x100000001) << 2 * Bits) << (16 - 2 * Bits);
      w = (w & k1 * 0x1000100010001) | (w & (k1 * 0x1000100010001) << Bits) << (8 - Bits);
      memcpy(code + i * 8, &w, 8);
    }
  }
  int i = words * 8;
  p += words * Bits;
  if (i == n) return;
  uint64_t w = 0;
  for (int j = 0; j < ((n - i) * Bits + 7) / 8; ++j) w |= uint64_t(p[j]) << (8 * j);
  for (int j = 0; i < n; ++i, ++j) code[i] = uint8_t(w >> (Bits * j)) & uint8_t((1 << Bits) - 1);
}

template <hm_table Table, int Bits, hm_scale Scale>
inline void dequantize_row(const hm_part& p, const uint8_t* const* buffers, int64_t row, int64_t columns, char* y,
                           Dtype y_dtype) {
  const int y_bytes = y_dtype == kF32 ? 4 : 2;
  const uint8_t* codes = buffers[p.codes_buffer] + p.codes_offset + row * p.row_bytes;
  uint8_t code[kSpan];
  float value[kSpan], table[1 << (Bits < 9 ? Bits : 1)];
  if constexpr (Table == hm_codebook)
    memcpy(table, buffers[p.codebook_buffer] + p.codebook_offset, sizeof table);
  else if constexpr (Table == hm_e2m1 || Table == hm_e2m1_gguf)
    for (int i = 0; i < 16; ++i) table[i] = 0.5f * float(e2m1_doubled[i]);
  const bool aside = Table != hm_plain && Table != hm_e2m1_gguf;  // scales in an array of their own
  const int64_t groups = (columns - 1) / p.group + 1;
  const int64_t first = row * groups * (Scale == hm_f32 ? 4 : Scale == hm_e8m0 ? 1 : 2);
  const uint8_t* scales = aside ? buffers[p.scale_buffer] + p.scale_offset + first : nullptr;
  const uint8_t* biases = aside && p.bias_buffer >= 0 ? buffers[p.bias_buffer] + p.bias_offset + first : nullptr;

  for (int64_t k = 0; k < columns; k += kSpan) {
    const int n = columns - k < kSpan ? int(columns - k) : kSpan;
    if constexpr (Table == hm_plain) {
      widen(codes + k * Bits / 8, value, n, Dtype(Scale));
    } else if constexpr (Table == hm_e2m1_gguf) {
      for (int i = 0; i < n; i += 32) {
        const uint8_t* block = codes + (k + i) / 32 * 17;
        const float s = e8m0_to_f32(block[0]);
        for (int j = 0; j < 16; ++j) {
          value[i + j] = s * table[block[1 + j] & 15];
          value[i + j + 16] = s * table[block[1 + j] >> 4];
        }
      }
    } else {
      unpack<Bits>(codes + k * Bits / 8, code, n);
      for (int i = 0; i < n; ++i) {
        if constexpr (Table == hm_linear)
          value[i] = float(code[i]);
        else if constexpr (Table == hm_linear_signed)
          value[i] = float(int(code[i]) - (1 << (Bits - 1)));
        else
          value[i] = table[code[i]];
      }
      for (int i = 0; i < n;) {
        const int64_t g = (k + i) / p.group, left = (g + 1) * p.group - (k + i);
        const int end = left < n - i ? i + int(left) : n;
        const float s = stored_number(scales, g, Scale);
        if (biases) {
          const float b = stored_number(biases, g, Scale);
          for (; i < end; ++i) value[i] = s * value[i] + b;
        } else {
          for (; i < end; ++i) value[i] *= s;
        }
      }
    }
    narrow(value, y + k * y_bytes, n, y_dtype);
  }
}

void dequantize(const DequantizeTask& t, int64_t begin, int64_t end) {
  const int y_bytes = t.y_dtype == hm_f32 ? 4 : 2;
  for (int64_t i = begin; i < end; ++i) {
    const hm_part* p = t.parts + t.index[i] / t.rows * t.per_expert;
    int64_t row = t.index[i] % t.rows;
    for (; row >= p->rows; ++p) row -= p->rows;
    char* y = static_cast<char*>(t.y) + i * t.columns * y_bytes;
    switch (p->instance) {
#define X(table, bits, scale)                                                                                \
  case hm_##table##_##bits##_##scale:                                                                      \
    dequantize_row<hm_##table, bits, hm_##scale>(*p, t.buffers, row, t.columns, y, Dtype(t.y_dtype)); \
    break;
      HM_INSTANCES(X)
#undef X
    }
  }
}

}  // namespace
}  // namespace hm
