// A packed weight as kernels see it: one array of 32-bit words and a table of parts that points into it.
// python/hadamoe/metal_weight.py makes both; codes are a checkpoint's own bits.
#include "place.metal"

namespace hm {

enum Table { linear, linear_signed, e2m1, e2m1_gguf, codebook, plain };
enum Scale { f32, f16, bf16, e8m0 };

// A block of rows of one kind. Places count 16-byte pieces of the words.
struct Part {
  uint rows, kind, group, stride, codes, scale, bias, table;  // stride: words from row to row
};
constexpr constant uint NONE = 0xffffffffu;
constexpr constant uint KIND = 0xffffffu;    // table << 16 | bits << 8 | scale
constexpr constant uint ROTATED = 1u << 24;  // the part reads x rotated

METAL_FUNC Part part_at(const device uint* parts, uint i) {
  const device uint* p = parts + 8 * i;
  Part part;
  part.rows = p[0], part.kind = p[1], part.group = p[2], part.stride = p[3];
  part.codes = p[4], part.scale = p[5], part.bias = p[6], part.table = p[7];
  return part;
}

METAL_FUNC const device uint* piece(const device uint* words, uint place) { return words + 4ul * place; }

// Scale or bias i as f32. E8M0's least, 2^-127, is below what a flushing GPU can hold: twice it here (see halved).
template <int SCALE>
METAL_FUNC float scale_at(const device uint* scales, ulong i) {
  if constexpr (SCALE == f32) {
    return as_type<float>(scales[i]);
  } else if constexpr (SCALE == f16) {
    return float(((const device half*)scales)[i]);
  } else if constexpr (SCALE == bf16) {
    return as_type<float>(uint(((const device ushort*)scales)[i]) << 16);
  } else {
    const uint e = ((const device uchar*)scales)[i];
    return as_type<float>(e == 255u ? 0x7fc00000u : max(e, 1u) << 23);
  }
}
// What to multiply a sum with before its scale, so that the product is right where the scale is 2^-127.
template <int SCALE>
METAL_FUNC float halved(const device uint* scales, ulong i) {
  if constexpr (SCALE == e8m0) return ((const device uchar*)scales)[i] == 0 ? 0.5f : 1.0f;
  return 1.0f;
}

// Table entries in registers. An indexed table would live in memory; a tree of selects does not.
template <int BITS>
struct Entries {
  float v[1 << BITS];
  METAL_FUNC float operator[](uint code) const {
    float level[1 << BITS];
    for (int i = 0; i < 1 << BITS; i++) level[i] = v[i];
    for (int b = 0; b < BITS; b++) {
      const bool bit = (code >> b) & 1u;
      for (int i = 0; i < 1 << (BITS - 1 - b); i++) level[i] = select(level[2 * i], level[2 * i + 1], bit);
    }
    return level[0];
  }
};
template <>
struct Entries<0> {};

METAL_FUNC float e2m1_value(uint code) {  // the bits of a half, 2^14 too small
  const uint h = (code & 8u) << 12 | (code & 7u) << 9;
  return float(as_type<half>(ushort(h))) * 16384.0f;
}

// Codes of one kind, 32 columns (a unit: `bits` words) at a time.
template <int TABLE, int BITS, int SCALE>
struct Codes {
  static constexpr constant int table_bits = TABLE == codebook ? BITS : 0;
  Entries<table_bits> entries;

  METAL_FUNC void open(const device uint* words, Part part) {
    if constexpr (TABLE == codebook) {
      const device float* t = (const device float*)piece(words, part.table);
      for (int i = 0; i < 1 << BITS; i++) entries.v[i] = t[i];
    }
  }
  METAL_FUNC float value(uint code) const {
    if constexpr (TABLE == linear || TABLE == linear_signed) return float(int(code) - (1 << (BITS - 1)));
    else if constexpr (TABLE == codebook) return entries[code];
    else return e2m1_value(code);
  }
  // w: 32 numbers of the unit whose words begin at p (a row's, but for GGUF, whose blocks are 17 bytes).
  METAL_FUNC void unit(const device uint* row, uint u, thread float* w) const {
    if constexpr (TABLE == plain) {
      for (int i = 0; i < 32; i++) w[i] = scale_at<SCALE>(row, 32 * u + i);
    } else if constexpr (TABLE == e2m1_gguf) {
      const device uchar* block = (const device uchar*)row + 17 * u + 1;
      for (int i = 0; i < 16; i++) w[i] = value(block[i] & 15u), w[i + 16] = value(block[i] >> 4);
    } else {
      uint stream[BITS];
      for (int i = 0; i < BITS; i++) stream[i] = row[BITS * u + i];
      for (int i = 0; i < 32; i++) {
        const int at = i * BITS, word = at / 32, bit = at % 32;
        uint code = stream[word] >> bit;
        if (bit + BITS > 32) code |= stream[word + 1] << (32 - bit);
        w[i] = value(code & ((1u << BITS) - 1u));
      }
    }
  }
  // The sum over a unit (dot: of w x, sum: of x) under its scale and bias. row: the part's row, groups: of a row.
  METAL_FUNC float scaled(const device uint* words, Part part, ulong row, uint groups, uint u, float dot,
                          float sum) const {
    if constexpr (TABLE == plain) {
      return dot;
    } else if constexpr (TABLE == e2m1_gguf) {
      const device uchar* block = (const device uchar*)(piece(words, part.codes) + row * part.stride) + 17 * u;
      const uint e = block[0];
      return dot * (e == 0 ? 0.5f : 1.0f) * as_type<float>(e == 255u ? 0x7fc00000u : max(e, 1u) << 23);
    } else {
      const ulong g = row * groups + (groups == 1 ? 0 : 32 * u / part.group);
      const device uint* scales = piece(words, part.scale);
      const float s = scale_at<SCALE>(scales, g), product = dot * halved<SCALE>(scales, g) * s;
      if constexpr (TABLE != linear) return product;
      const float bias = part.bias == NONE ? 0.0f : scale_at<SCALE>(piece(words, part.bias), g);
      // codes count from their middle: code * x and bias * sum(x) would be large and cancel
      return product + (bias + float(1 << (BITS - 1)) * s) * sum;
    }
  }
};

}  // namespace hm
