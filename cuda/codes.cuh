// A packed weight as kernels see it, one array of words and a table of parts that points into it
// (python/hadamoe/gpu_weight.py makes both), and how its codes become signed bytes in registers.
//
//   Codes<TABLE, BITS> c;              TABLE is LINEAR, E2M1 or CODEBOOK; others are one of them (`Form`)
//   c.open(words, part)                registers a table needs
//   c.WIDTH, c.PLANES, c.SIGNED        bits of a code; how many bytes one becomes, and of which kind
//   c.four(w, q, out)                  w: BITS words, 32 codes. out[0..PLANES): byte j of each belongs to column
//                                      column_of(Form::order, q, j) of the 32, q < 8 known when compiled
//   c.value(f, stride)                 the number that sums f[p * stride] of the products of PLANES stand for
//   c.unit, c.base                     number = unit * value(bytes - centre) + base; centre: `Form`
#pragma once
#include "fixed.cuh"
#include "rotate.cuh"

namespace hm {

enum WeightTable { LINEAR, LINEAR_SIGNED, E2M1, E2M1_GGUF, CODEBOOK, PLAIN };
enum { E8M0 = 3 };  // of a scale, after Number's

// A block of rows of one kind. Places count 16-byte pieces of the words.
struct Part {
  uint rows, kind, group, stride, codes, scale, bias, table;  // stride: words from row to row
};
constexpr uint NONE = 0xffffffffu;

__device__ inline Part part_at(const uint* parts, size_t i) {
  const uint4* p = reinterpret_cast<const uint4*>(parts) + 2 * i;
  const uint4 a = p[0], b = p[1];
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}
__device__ inline const uint* piece(const uint* words, uint place) { return words + size_t(place) * 4; }

// What a kind says.
__host__ __device__ constexpr int table_of(uint kind) { return int(kind >> 16 & 255); }
__host__ __device__ constexpr int bits_of(uint kind) { return int(kind >> 8 & 255); }
__host__ __device__ constexpr int scale_of(uint kind) { return int(kind & 255); }
__host__ __device__ constexpr bool is_rotated(uint kind) { return kind >> 24 & 1; }  // the part reads x rotated
__host__ __device__ constexpr int group_of(uint kind) { return 32 * int(kind >> 25); }  // 0: a scale for the row, or none

// In which order codes leave their words.
enum Order { NATURAL, PAIRS, FOURS, GGUF };
// Column, of 32, of byte j of word q.
__host__ __device__ constexpr int column_of(int order, int q, int j) {
  return order == NATURAL ? 4 * q + j
         : order == PAIRS ? 8 * (q / 2) + q % 2 + 2 * j
         : order == FOURS ? 16 * (q / 4) + q % 4 + 4 * j
                          : 2 * q + j / 2 + 16 * (j % 2);
}

// How x must lie for the codes of a kind.
struct Form {
  int order;
  int wide;    // columns that a lane takes at once
  int span;    // columns of one exact integer: they share a scale
  int centre;  // is taken off every byte, to keep sums small: bias * sum(x) would cancel most of them
};
// 128 for most experts' kind, a codebook's two bits, of which a lane takes 64 columns at once.
__host__ __device__ constexpr int span_of(uint kind) {
  const int table = table_of(kind), group = group_of(kind);
  if (table == CODEBOOK && bits_of(kind) == 2 && group % 128 == 0) return 128;
  return table == E2M1 || table == E2M1_GGUF || group % 64 ? 32 : 64;
}
__host__ __device__ constexpr int wide_of(uint kind) { return span_of(kind) == 128 ? 64 : 32; }
// Whether codes of a table and bits may come, in such spans if given. HM_KINDS lists the kinds of parts that a text is
// for, where that is known (hadamoe.mlx_cuda): for all of them it compiles far longer.
__host__ __device__ constexpr bool may_come(int table, int bits, int span = 0) {
#ifdef HM_KINDS
  for (uint kind : {HM_KINDS}) {
    const int of = table_of(kind), own = of == LINEAR_SIGNED ? LINEAR : of == E2M1_GGUF ? E2M1 : of;
    if (own == table && bits_of(kind) == bits && (span == 0 || span_of(kind) == span)) return true;
  }
  return false;
#else
  return true;
#endif
}

__host__ __device__ constexpr int centre_of(int table, int bits) {
  return table == CODEBOOK ? bits == 2 : table >= E2M1 ? 0 : 1 << (bits - 1);
}
__device__ inline Form form_of(uint kind) {
  const int table = table_of(kind), bits = bits_of(kind);
  const int order = table == E2M1_GGUF ? GGUF : bits == 2 ? FOURS : bits == 4 && table < E2M1 ? PAIRS : NATURAL;
  return {order, wide_of(kind), span_of(kind), centre_of(table, bits)};
}

// Scale or bias i of those at a place: its bits, and the number.
__device__ inline uint scale_log(int scale) { return scale == F32 ? 2 : scale == E8M0 ? 0 : 1; }
__device__ inline uint stored(const uint* words, uint place, uint i, int scale) {
  const unsigned char* p = reinterpret_cast<const unsigned char*>(piece(words, place)) + (i << scale_log(scale));
  if (scale == F32) return *reinterpret_cast<const uint*>(p);
  if (scale == E8M0) return *p;
  return *reinterpret_cast<const unsigned short*>(p);
}
__device__ inline float scale_number(uint bits, int scale) {
  if (scale == BF16) return from_bf16(bits);
  if (scale == F16) return from_f16(bits);
  if (scale == F32) return __uint_as_float(bits);
  return __uint_as_float(bits == 255u ? 0x7fc00000u : bits ? bits << 23 : 0x00400000u);
}

template <int COUNT>
__device__ inline void load_words(const uint* from, uint* to) {
  if constexpr (COUNT % 4 == 0) {
    EACH(i, COUNT / 4) {
      const uint4 w = reinterpret_cast<const uint4*>(from)[i];
      to[4 * i] = w.x, to[4 * i + 1] = w.y, to[4 * i + 2] = w.z, to[4 * i + 3] = w.w;
    }
  } else if constexpr (COUNT % 2 == 0) {
    EACH(i, COUNT / 2) {
      const uint2 w = reinterpret_cast<const uint2*>(from)[i];
      to[2 * i] = w.x, to[2 * i + 1] = w.y;
    }
  } else {
    EACH(i, COUNT) to[i] = from[i];
  }
}

// COUNT bits of a stream and whatever is above them.
template <int COUNT>
__device__ inline uint bits_at(const uint* w, int bit) {
  const int i = bit / 32, shift = bit % 32;
  return shift == 0 ? w[i] : shift + COUNT <= 32 ? w[i] >> shift : __funnelshift_r(w[i], w[i + 1], shift);
}
// Two fields of SIZE bits each, moved to the bottoms of two halves of 2 * HALF bits; whatever is above stays.
template <int SIZE, int HALF>
__device__ inline uint apart(uint p) {
  return p + (p >> SIZE) * ((1u << HALF) - (1u << SIZE));
}

template <int TABLE, int BITS>
struct Codes;

template <int BITS>
struct Codes<LINEAR, BITS> {
  static constexpr int KIND = LINEAR, WIDTH = BITS, PLANES = 1;
  static constexpr bool SIGNED = false;
  static constexpr bool SHIFTS = true;  // a number times sum(x) is added: base, or a bias
  static constexpr float unit = 1.0f, base = float(1 << (BITS - 1));  // base: with a bias only
  __device__ void open(const uint*, const Part&) {}
  __device__ void four(const uint* w, int q, uint* out) const {
    if constexpr (BITS == 8) {
      out[0] = w[q];
    } else if constexpr (BITS == 4) {
      out[0] = w[q / 2] >> 4 * (q % 2) & 0x0f0f0f0fu;
    } else if constexpr (BITS == 2) {
      out[0] = w[q / 4] >> 2 * (q % 4) & 0x03030303u;
    } else {
      constexpr uint code = (1u << BITS) - 1;
      const uint t = apart<2 * BITS, 16>(bits_at<4 * BITS>(w, 4 * BITS * q));
      out[0] = (t & code * 0x00010001u) | (t << (8 - BITS) & code * 0x01000100u);
    }
  }
  __device__ float value(const float* f, int) const { return f[0]; }
};

// Bytes of 16 looked up by four nibbles of `codes`, in registers.
__device__ inline uint four_of_16(const uint* table, uint codes, uint upper) {
  return __byte_perm(__byte_perm(table[0], table[1], codes), __byte_perm(table[2], table[3], codes), upper);
}
// Nibbles of w as selectors: of 8 bytes, and of the lower or the upper 8.
__device__ inline uint of_eight(uint w, int q) { return (w & 0x77777777u) >> 16 * (q % 2); }
__device__ inline uint of_halves(uint w, int q) { return ((w >> 1 & 0x44444444u) | 0x32103210u) >> 16 * (q % 2); }

// Twice an E2M1 number is a byte.
template <>
struct Codes<E2M1, 4> {
  static constexpr int KIND = E2M1, WIDTH = 4, PLANES = 1;
  static constexpr bool SIGNED = true;
  static constexpr bool SHIFTS = false;
  static constexpr float unit = 0.5f, base = 0.0f;
  __device__ void open(const uint*, const Part&) {}
  __device__ void four(const uint* w, int q, uint* out) const {
    const uint table[4] = {0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu};
    out[0] = four_of_16(table, of_eight(w[q / 2], q), of_halves(w[q / 2], q));
  }
  __device__ float value(const float* f, int) const { return f[0]; }
};

// entry = e0 + a b0 + b b1 + c b0 b1 over a code's bits: three planes of bits, exact. c is 0 for a table that is its
// own mirror image, as Lloyd and Max make it: SYMMETRIC leaves its plane out.
template <bool SYMMETRIC>
struct TwoBits {
  static constexpr int KIND = CODEBOOK, WIDTH = 2, PLANES = SYMMETRIC ? 2 : 3;
  static constexpr bool SIGNED = true;
  static constexpr bool SHIFTS = true;
  static constexpr float unit = 1.0f;
  float first, second, both, base;
  static __device__ bool fits(const uint* words, const Part& part) {
    const float4 e = *reinterpret_cast<const float4*>(piece(words, part.table));
    return !SYMMETRIC || e.y - e.x == e.w - e.z;
  }
  __device__ void open(const uint* words, const Part& part) {
    const float4 e = *reinterpret_cast<const float4*>(piece(words, part.table));
    first = e.y - e.x, second = 0.5f * (e.z - e.x);
    both = (e.w - e.z) - first, base = 0.5f * (e.x + e.z);
  }
  // The second plane holds 0 and 2, its centre is 1.
  __device__ void four(const uint* w, int q, uint* out) const {
    const uint codes = w[q / 4] >> 2 * (q % 4);
    out[0] = codes & 0x01010101u, out[1] = codes & 0x02020202u;
    if constexpr (!SYMMETRIC) out[2] = (w[q / 4] & w[q / 4] >> 1) >> 2 * (q % 4) & 0x01010101u;
  }
  __device__ float value(const float* f, int stride) const {
    const float v = fmaf(second, f[stride], first * f[0]);
    return SYMMETRIC ? v : fmaf(both, f[2 * stride], v);
  }
};

// Entries in 24-bit fixed point of the largest, as three signed bytes: off by 2^-23 of it at most.
template <int BITS>
struct Codes<CODEBOOK, BITS> {
  static constexpr int KIND = CODEBOOK, WIDTH = BITS, PLANES = 3;
  static constexpr bool SIGNED = true;
  static constexpr bool SHIFTS = false;
  static constexpr float base = 0.0f;
  uint entry[3][BITS == 4 ? 4 : 2];
  float unit;
  __device__ void open(const uint* words, const Part& part);
  __device__ void four(const uint* w, int q, uint* out) const {
    if constexpr (BITS == 4) {
      EACH(p, 3) out[p] = four_of_16(entry[p], of_eight(w[q / 2], q), of_halves(w[q / 2], q));
    } else {
      const uint t = apart<12, 16>(bits_at<24>(w, 24 * (q / 2)));
      const uint u = (t & 0x003f003fu) | (t << 2 & 0x3f003f00u);
      const uint codes = ((u & 0x07070707u) | (u << 1 & 0x70707070u)) >> 16 * (q % 2);
      EACH(p, 3) out[p] = __byte_perm(entry[p][0], entry[p][1], codes);
    }
  }
  __device__ float value(const float* f, int stride) const {
    return fmaf(fmaf(f[0], 256.0f, f[stride]), 256.0f, f[2 * stride]);
  }
};

// h, m and l of four integers, a word each.
__device__ inline void three_bytes(const int* v, uint* words) {
  uint part[3][4];
  EACH(j, 4) {
    const int m = (v[j] + 128) >> 8;
    part[0][j] = uint((m + 128) >> 8), part[1][j] = uint(m), part[2][j] = uint(v[j]);
  }
  EACH(p, 3)
    words[p] = __byte_perm(__byte_perm(part[p][0], part[p][1], 0x0040), __byte_perm(part[p][2], part[p][3], 0x0040), 0x5410);
}

template <int BITS>
__device__ void Codes<CODEBOOK, BITS>::open(const uint* words, const Part& part) {
  constexpr int size = 1 << BITS;
  const float* table = reinterpret_cast<const float*>(piece(words, part.table));
  uint lane = lane_index();
  keep_here(lane);  // or its place in all tables would be made ahead of all loops, and kept in registers
  const uint largest = warp_largest(__float_as_uint(table[lane % size]) & 0x7fffffffu);
  const int e = Fixed<3>::exponent(largest);
  EACH(i, size / 4) {
    int v[4];
    uint bytes[3];
    EACH(j, 4) v[j] = Fixed<3>::of(table[4 * i + j], e);
    three_bytes(v, bytes);
    EACH(p, 3) entry[p][i] = bytes[p];
  }
  unit = Fixed<3>::unit(largest, e);
}

}  // namespace hm
