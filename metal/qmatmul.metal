// y = x W^T for a prompt: tiles of tokens times rows by simdgroup matrices, codes decoded on the way into threadgroup
// memory, all in f32. Tokens may be (token, expert) pairs in the order of their experts: a tile then goes through the
// experts that meet in it, one after the other.
#include "weight.metal"

namespace hm {

// Columns 8 * i .. 8 * i + 7 of a row: as many bytes as a code has bits.
template <int KIND>
METAL_FUNC void eight_of(const device uint* row, uint i, thread uint* w) {
  constexpr int bits = Kind<KIND>::bits;
  if constexpr (Kind<KIND>::table == e2m1_gguf) {
    EACH(j, 2) w[j] = row[i / 4 * 4 + i % 2 * 2 + j] >> i % 4 / 2 * 4;
  } else if constexpr (bits % 4 == 0) {
    EACH(j, bits / 4) w[j] = row[i * (bits / 4) + j];
  } else {
    w[0] = w[1] = 0;
    EACH(j, bits) w[j / 4] |= uint(((const device uchar*)row)[i * bits + j]) << 8 * (j % 4);
  }
}

// A tile of MOST tokens and 32 rows, by 4 simdgroups.
template <int IN, int K, int STRIDE, int SLOTS, int MOST, class T, class Order, class Y>
struct Tile {
  enum { THREADS = 128, LINE = 36 };  // LINE: floats from row to row of what lies in threadgroup memory
  const device T* x;
  const device float* rotated;  // x for parts that want it rotated, or null: x is
  const device uint* words;
  Part part;
  Order order;  // places of pairs, by expert, or null: of all tokens
  const device Y* residual;
  device Y* y;              // of the part's first row
  threadgroup float* tile;  // MOST + 32 lines
  uint first, begin, end;   // pairs: the tile's first, and those it is for
  uint row;
  Place at;

  template <int KIND>
  METAL_FUNC void run() {
    using Is = Kind<KIND>;
    constexpr int k = Is::rotated ? K : IN, high = MOST / 16;
    constexpr float shrink = Is::scale == e8m0 ? 16777216.0f : 1.0f;  // 2^-127 times a number is flushed
    Codes<Is::table, Is::bits, Is::scale> codes;
    codes.open(words, part, at.lane);
    const uint top = at.simd / 2 * (MOST / 2), left = at.simd % 2 * 16;
    simdgroup_matrix<float, 8, 8> sums[high][2];
    EACH(m, high) EACH(n, 2) sums[m][n] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    for (uint from = 0; from < uint(k); from += 32) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (uint i = at.index; i < MOST * 4; i += THREADS) {
        const uint pair = first + i / 4, column = from + i % 4 * 8;
        float v[8];
        EACH(j, 8) v[j] = 0.0f;
        if (pair >= begin && pair < end && column < uint(k)) {
          const ulong token = order ? uint(order[pair]) / SLOTS : pair;
          if (Is::rotated && rotated) load_eight<K>(rotated + token * K, column, v);
          else load_eight<k>(x + token * k, column, v);
        }
        put(i, v);
      }
      {
        const uint n = min(row + at.index / 4, part.rows - 1), column = from + at.index % 4 * 8;
        float v[8];
        EACH(j, 8) v[j] = 0.0f;
        if (column < uint(k)) {
          uint w[Is::words < 2 ? 2 : Is::words];
          eight_of<KIND>(piece(words, part.codes) + ulong(n) * part.stride, column / 8, w);
          codes.eight(w, 0, v);
          if constexpr (Is::table != plain) {
            constexpr uint groups = Is::group ? (k + Is::group - 1) / Is::group : 1;
            Factor<Is::table, Is::bits, Is::scale> factor{0, 0};
            factor.load(words, part, ulong(n) * groups + (Is::group ? column / Is::group : 0));
            EACH(j, 8) v[j] = factor.times(v[j] * shrink, 1.0f);
          }
        }
        put(MOST * 4 + at.index, v);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      EACH(c, 4) {
        simdgroup_matrix<float, 8, 8> w[2], t;
        EACH(n, 2) simdgroup_load(w[n], tile + (MOST + left + 8 * n) * LINE + 8 * c, LINE, ulong2(0, 0), true);
        EACH(m, high) {
          const uint at_pair = first + top + 8 * m;
          if (at_pair + 8 > begin && at_pair < end) {
            simdgroup_load(t, tile + (top + 8 * m) * LINE + 8 * c, LINE);
            EACH(n, 2) simdgroup_multiply_accumulate(sums[m][n], t, w[n], sums[m][n]);
          }
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    EACH(m, high) EACH(n, 2) simdgroup_store(sums[m][n], tile + (top + 8 * m) * LINE + left + 8 * n, LINE);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = at.index; i < MOST * 32; i += THREADS) {
      const uint pair = first + i / 32, n = row + i % 32;
      if (pair < begin || pair >= end || n >= part.rows) continue;
      const ulong to = ulong(order ? uint(order[pair]) : pair) * STRIDE + n;
      y[to] = Y((residual ? float(residual[to]) : 0.0f) + tile[i / 32 * LINE + i % 32] / shrink);
    }
  }

  // v[0..8) to chunk i of 4 in each line.
  METAL_FUNC void put(uint i, thread const float* v) {
    EACH(j, 2) *(threadgroup float4*)(tile + i / 4 * LINE + i % 4 * 8 + 4 * j) = float4(v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3]);
  }
};

// y[t, n] = residual[t, n] + x[t] . W[n], or, of pairs p = order[i]: y[p, n] = ... x[p / SLOTS] . W[expert[i]][n]
//   IN: columns of x   K: of a rotated row   N: rows of an expert   PARTS: of an expert   count: tokens, or pairs
//   SLOTS: pairs of a token   MOST: pairs of a tile   KINDS: of the parts
// Groups: (blocks of 32 rows, count / MOST). expert: ascending, or null with order.
template <int IN, int K, int N, int PARTS, int SLOTS, int MOST, int... KINDS, class T, class Order, class E, class Count,
          class Y>
METAL_FUNC void qmatmul(const device T* x, const device float* rotated, const device uint* words,
                        const device uint* parts, Order order, E expert, Count count,
                        const device Y* residual, device Y* y, threadgroup float* tile, Place at) {
  const uint first = at.group.y * MOST, last = min(first + MOST, uint(count[0]));
  uint end = last;
  for (uint begin = first; begin < last; begin = end) {
    const device uint* table = parts;
    if (expert) {
      const uint e = expert[begin];
      table += ulong(e) * PARTS * 8;
      for (end = begin + 1; end < last && uint(expert[end]) == e;) end++;
    }
    uint block = at.group.x, above = 0, p = 0;
    for (; p < PARTS; p++) {
      const uint rows = table[8 * p], blocks = (rows + 31) / 32;
      if (block < blocks) break;
      block -= blocks, above += rows;
    }
    if (p == PARTS) continue;
    Tile<IN, K, N, SLOTS, MOST, T, Order, Y> part{x, rotated, words, part_at(table, p), order,
                                                  residual ? residual + above : nullptr, y + above, tile, first, begin,
                                                  end, block * 32, at};
    with_kind<KINDS...>(part.part.kind, part);
  }
}

}  // namespace hm
