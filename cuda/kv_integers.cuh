// Products of our codes with signed bytes: whole numbers on tensor cores, the CPU's. 16 rows of 64 terms at a time: tokens of
// columns for scores, columns of tokens for values. A lane has rows 4 (lane / 4) .. + 3 of 32, so that it reads 16 bytes at a
// time; codes leave their words out of order, the bytes they meet are put in that order.
#pragma once
#include "kv_codec.cuh"

namespace hm {

// The words of four rows of 64 terms.
template <int BITS>
struct Codes {
  static constexpr int LOADS = BITS == 8 ? 4 : BITS == 2 ? 1 : 2;
  uint4 words[LOADS];

  // tiles: of the 16 rows among which a lane's are, and `next` words behind another 32 terms of them.
  __device__ void load(const uint* tiles, uint next = 16 * BITS) {
    const uint lane = lane_index(), t = lane % 4;
    const uint* at = tiles + lane / 4 % 4 * 4;
    if constexpr (BITS == 2) take(0, at + t / 2 * next + t % 2 * 16);
    if constexpr (BITS == 3) take(0, at + t / 2 * next + t % 2 * 16), take(1, at + t / 2 * next + 32);
    if constexpr (BITS == 4) take(0, at + 16 * t), take(1, at + next + 16 * t);
    if constexpr (BITS == 8) EACH(i, 4) take(i, at + i / 2 * next + (2 * t + i % 2) * 16);
  }
  __device__ void take(int i, const uint* from) { words[i] = *reinterpret_cast<const uint4*>(from); }
  __device__ uint word(int i, int row) const {
    return row == 0 ? words[i].x : row == 1 ? words[i].y : row == 2 ? words[i].z : words[i].w;
  }

  // Levels of a row's 16 terms of this lane, in four words.
  __device__ void levels(int row, uint* four) const {
    if constexpr (BITS == 2) {
      const uint w = word(0, row);
      two(0x5a1be5a6u, 0, w & 0x33333333u, four), two(0x5a1be5a6u, 0, w >> 2 & 0x33333333u, four + 2);
    } else if constexpr (BITS == 3) {  // the third bits: of quads 4 (t % 2) .. + 3, two to half a byte
      const uint w = word(0, row), v = word(1, row) >> lane_index() % 2 * 4;
      const uint top = (v & 0x03030303u) | (v << 2 & 0x30303030u);
      two(0xf6e1c9a8u, 0x58371f0au, (w & 0x33333333u) | (top << 2 & 0x44444444u), four);
      two(0xf6e1c9a8u, 0x58371f0au, (w >> 2 & 0x33333333u) | (top << 1 & 0x44444444u), four + 2);
    } else if constexpr (BITS == 4) {
      EACH(i, 2) sixteen(word(i, row), four + 2 * i);
    } else {
      EACH(i, 4) four[i] = word(i, row) ^ 0x80808080u;
    }
  }
  // Eight codes of half a byte each, below 8, by a table of 8 bytes.
  static __device__ void two(uint low, uint high, uint codes, uint* words) {
    words[0] = permute_bytes(low, high, codes);
    words[1] = permute_bytes(low, high, codes >> 16);
  }
  static __device__ void sixteen(uint w, uint* words) {
    uint below[2], above[2];
    two(0xd0c2b198u, 0xfbf1e7dcu, w & 0x77777777u, below), two(0x24190f05u, 0x684f3e30u, w & 0x77777777u, above);
    const uint up = w << 4;  // the sign bits of `up` and w are the codes' top bits
    const uint mask[2] = {permute_bytes(up, w, 0xd9c8u), permute_bytes(up, w, 0xfbeau)};
    EACH(i, 2) words[i] = (below[i] & ~mask[i]) | (above[i] & mask[i]);
  }
};

// This lane's 16 of 64 bytes, in the order in which codes leave their words. Of TERMS 32, the other 32 are zeros.
template <int BITS, int TERMS = 64>
__device__ __forceinline__ void load_terms(const signed char* bytes, uint* four) {
  const uint t = lane_index() % 4;
  uint n[4] = {};
  if constexpr (BITS < 4) {
    if (16 * t < TERMS) {
      const uint4 w = *reinterpret_cast<const uint4*>(bytes + 16 * t);
      n[0] = w.x, n[1] = w.z, n[2] = w.y, n[3] = w.w;
    }
  } else {
    const uint2 a = *reinterpret_cast<const uint2*>(bytes + 8 * t);
    n[0] = a.x, n[1] = a.y;
    if constexpr (TERMS == 64) {
      const uint2 b = *reinterpret_cast<const uint2*>(bytes + 32 + 8 * t);
      n[2] = b.x, n[3] = b.y;
    }
  }
  EACH(i, 2) {
    four[2 * i] = BITS == 8 ? n[2 * i] : permute_bytes(n[2 * i], n[2 * i + 1], 0x5140u);
    four[2 * i + 1] = BITS == 8 ? n[2 * i + 1] : permute_bytes(n[2 * i], n[2 * i + 1], 0x7362u);
  }
}

// sums[i] += rows 2 i and 2 i + 1 of every lane's four, times 8 columns. As fragments of multiply_bytes: sums[i][e] is of row
// 4 (lane / 4) + 2 i + e / 2 and column 2 (lane % 4) + e % 2.
template <int BITS>
__device__ __forceinline__ void add_products(const Codes<BITS>& codes, const uint* bytes, int (*sums)[4]) {
  EACH(i, 2) {
    uint a[4], b[4];
    codes.levels(2 * i, a), codes.levels(2 * i + 1, b);
    EACH(k, 2) {
      const uint rows[4] = {a[2 * k], b[2 * k], a[2 * k + 1], b[2 * k + 1]};
      multiply_bytes(sums[i], rows, bytes + 2 * k);
    }
  }
}

// 32 tokens of a page of keys times 8 queries as signed bytes: `query` is number lane / 4. Of 32 columns, codes come twice,
// the second time times zeros.
template <int BITS, int D>
__device__ __forceinline__ void code_sums(const uint* page, uint half, const signed char* query, int (*sums)[4]) {
  const uint* tiles = page + (2 * half + lane_index() / 16) * (D / 2) * BITS;
  constexpr int TERMS = D < 64 ? D : 64, COUNT = D / TERMS;
  constexpr int STEP = BITS == 8 && D == 256 ? 2 : COUNT;  // as many words on their way as registers hold
  EACH(i, 2) EACH(e, 4) sums[i][e] = 0;
  HM_UNROLL for (int first = 0; first < COUNT; first += STEP) {
    Codes<BITS> codes[STEP];
    EACH(c, STEP) codes[c].load(tiles + (first + c) * 32 * BITS, TERMS == 64 ? 16 * BITS : 0);
    EACH(c, STEP) {
      uint bytes[4];
      load_terms<BITS, TERMS>(query + 64 * (first + c), bytes);
      add_products<BITS>(codes[c], bytes, sums);
    }
  }
}

}  // namespace hm
