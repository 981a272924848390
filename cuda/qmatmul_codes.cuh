// A part's codes as A of mma: of each 32 columns of a row (a step) a lane has 8, as two words of signed bytes. Decoded
// from shared memory in registers.
#pragma once
#include "codes.cuh"

namespace hm {

// How a token's record (qmatmul_prepare.cuh) lies, as the codes of a part are decoded; hadamoe.cuda_tiles.form_of.
//   NATURAL, PAIRS, GGUF: signed bytes, 128 columns in a record; lane t of four has words 2 t and 2 t + 1 of each 32
//   HALVES, BFLOATS: f16 in units of a power of two, or bf16, 64 columns in a record
enum { HALVES = GGUF + 1, BFLOATS };

// What decodes a part. Forms say which columns the 8 are.
//   NIBBLES: linear of 4 bits   BYTES: of 8   SPREAD: of 3, 5, 6
//   LOOK2, LOOK3, LOOK4: entries of a table of bytes, by byte permutes: codebooks, E2M1, linear of 2 bits
//   WORDS: plain numbers of 16 bits   FLOATS: of 32
enum Way { NIBBLES, BYTES, SPREAD, LOOK2, LOOK3, LOOK4, WORDS, FLOATS };

// What a kind says.
struct TileKind {
  uint kind;
  __device__ int table() const { return table_of(kind); }
  __device__ int bits() const { return bits_of(kind); }
  __device__ int scale() const { return scale_of(kind); }
  __device__ bool linear() const { return table() <= LINEAR_SIGNED; }
  __device__ bool biased() const { return table() == LINEAR; }
  __device__ bool book() const { return table() == CODEBOOK; }
  __device__ bool plain() const { return table() == PLAIN; }
  __device__ int way() const {
    if (plain()) return bits() == 32 ? FLOATS : WORDS;
    if (!linear()) return bits() == 2 ? LOOK2 : bits() == 3 ? LOOK3 : LOOK4;
    return bits() == 2 ? LOOK2 : bits() == 4 ? NIBBLES : bits() == 8 ? BYTES : SPREAD;
  }
  __device__ int form() const {
    if (plain()) return scale() == F16 ? HALVES : BFLOATS;
    return table() == E2M1_GGUF ? GGUF : bits() == 2 || (linear() && bits() == 4) ? PAIRS : NATURAL;
  }
};

// Bytes BITS * t .. of a step's BITS words: 8 codes.
template <int BITS>
__device__ inline uint2 eight_codes(const uint* w, uint t) {
  if (BITS == 2) return make_uint2(w[t / 2] >> t % 2 * 16, 0);
  if (BITS == 4) return make_uint2(w[t], 0);
  if (BITS == 8) return *reinterpret_cast<const uint2*>(w + 2 * t);
  const uint at = BITS * t / 4, shift = BITS * t % 4 * 8;
  const uint low = w[at], high = w[min_of(at + 1, BITS - 1)];
  return make_uint2(__funnelshift_r(low, high, shift), high >> shift);
}

// The first 4 codes of w, WIDTH bits each from now on, in their upper bits.
template <int BITS, int WIDTH>
__device__ inline uint spread(uint w) {
  constexpr uint mask = ((1u << BITS) - 1u) << (WIDTH - BITS);
  uint v = 0;
  EACH(i, 4) v |= w << (WIDTH - BITS) * (i + 1) & mask << WIDTH * i;
  return v;
}

// Entries of a table of 16 bytes; the low three bits of each selector are in `low`, the fourth is in `pick`.
__device__ inline uint look_up(uint4 table, uint low, uint pick) {
  return __byte_perm(__byte_perm(table.x, table.y, low), __byte_perm(table.z, table.w, low), pick);
}

// Two words: k 4 t .. and 16 more of mma. Bytes are codes less their middle, in the byte's upper bits: signs are free.
template <int BITS>
__device__ inline uint2 spread_eight(const uint* w, uint t) {
  const uint2 v = eight_codes<BITS>(w, t);
  const uint next = __funnelshift_r(v.x, v.y, 4 * BITS);
  return make_uint2(spread<BITS, 8>(v.x) ^ 0x80808080u, spread<BITS, 8>(next) ^ 0x80808080u);
}
__device__ inline uint2 nibbles(const uint* w, uint t) {
  return make_uint2((w[t] << 4 & 0xf0f0f0f0u) ^ 0x80808080u, (w[t] & 0xf0f0f0f0u) ^ 0x80808080u);
}
__device__ inline uint2 bytes_of(const uint* w, uint t) {
  const uint2 v = eight_codes<8>(w, t);
  return make_uint2(v.x ^ 0x80808080u, v.y ^ 0x80808080u);
}
__device__ inline uint2 look2(const uint* w, uint t, uint4 table) {
  const uint v = eight_codes<2>(w, t).x;
  return make_uint2(__byte_perm(table.x, 0, v & 0x3333u), __byte_perm(table.x, 0, v >> 2 & 0x3333u));
}
__device__ inline uint2 look3(const uint* w, uint t, uint4 table) {
  const uint v = eight_codes<3>(w, t).x;
  // spread leaves a code in the upper bits of its four
  return make_uint2(__byte_perm(table.x, table.y, spread<3, 4>(v) >> 1),
                    __byte_perm(table.x, table.y, spread<3, 4>(v >> 12) >> 1));
}
__device__ inline uint2 look4(const uint* w, uint t, uint4 table) {
  const uint low = w[t] & 0x77777777u, pick = (w[t] >> 1 & 0x44444444u) | 0x32103210u;
  return make_uint2(look_up(table, low & 0xffffu, pick & 0xffffu), look_up(table, low >> 16, pick >> 16));
}

// STEPS steps of 16 rows, in the registers mma takes. words: of row lane / 4 at the first step; stride: words from row to
// row; bits: words of a step.
template <int STEPS, class F>
__device__ inline void each_row(const uint* words, int stride, int bits, F two, uint (&a)[STEPS][4]) {
  EACH(s, STEPS) {
    EACH(r, 2) {
      const uint2 v = two(words + 8 * r * stride + s * bits, lane_index() % 4);
      a[s][r] = v.x, a[s][r + 2] = v.y;
    }
  }
}

// Byte c of them: only a book's have more than one.
template <int STEPS>
__device__ inline void decode(TileKind kind, const uint* words, int stride, uint4 table, int c, uint (&a)[STEPS][4]) {
  auto each = [&](int step, auto two) { each_row<STEPS>(words, stride, step, two, a); };
  const int way = kind.way();
  if (way == LOOK2) each(2, [=](const uint* w, uint t) { return look2(w, t, table); });
  else if (way == LOOK3) each(3, [=](const uint* w, uint t) { return look3(w, t, table); });
  else if (way == LOOK4) each(4, [=](const uint* w, uint t) { return look4(w, t, table); });
  else if (c) return;
  else if (way == NIBBLES) each(4, nibbles);
  else if (way == BYTES) each(8, bytes_of);
  else if (kind.bits() == 3) each(3, spread_eight<3>);
  else if (kind.bits() == 5) each(5, spread_eight<5>);
  else each(6, spread_eight<6>);
}

// Bytes of the table that a LOOK decodes by, [PLANES][16], and what its numbers are multiplied by afterwards. By the
// first warp: an entry for each lane. A codebook's entries are fixed point under the largest.
template <int PLANES>
__device__ inline void make_table(TileKind kind, const float* entries, unsigned char* bytes, float* factor) {
  using Is = Fixed<PLANES>;
  const int i = lane_index();
  int v = 0;
  float unit = 1.0f;
  if (kind.book()) {
    const float entry = i < 1 << kind.bits() ? entries[i] : 0.0f;
    const uint top = warp_largest(__float_as_uint(entry) & 0x7fffffffu);
    const int e = Is::exponent(top);
    v = top < 0x7f800000u ? Is::of(entry, e) : 0;
    unit = Is::unit(top, e) * float(1 << 8 * (PLANES - 1));  // NaN where an entry is no number
  } else if (kind.linear()) {
    v = (i - 2) * (64 << 8 * (PLANES - 1));
    unit = scaled(1.0f, kind.bits() - 8);
  } else {
    const int twice = int(0x0c08060403020100ull >> i % 8 * 8 & 255u);
    v = (i < 8 ? twice : -twice) * (1 << 8 * (PLANES - 1));
    unit = 0.5f;
  }
  if (i < 16) EACH(p, PLANES) bytes[16 * p + i] = byte_of<PLANES>(v, p);
  if (i == 0) *factor = unit;
}

}  // namespace hm
