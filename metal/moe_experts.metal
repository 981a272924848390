// Experts of a prompt's tokens: tokens of one expert read its codes together.
#include "moe_rows.metal"

namespace hm {

// The inputs of up to TOKENS slots.
template <int K, int TOKENS>
struct Chosen {
  const device float* x[TOKENS];

  template <bool ROTATED, bool WHOLE>
  METAL_FUNC void eight(int t, uint i, thread float* v) const {
    EACH(j, 8) v[j] = 0.0f;
    if (WHOLE || i < uint(K)) load_eight<K>(x[t], i, v);
  }
};

template <int K, int N, int HEIGHT, int TOKENS>
struct ChosenRows {
  const device uint* words;
  Chosen<K, TOKENS> x;
  device float* y[TOKENS];  // rows of the expert from the block's first on, null: no token
  uint lane;
  Part part;
  uint row;

  template <int KIND>
  METAL_FUNC void run() {
    constexpr int lanes = lanes_of(K, Kind<KIND>::columns), step = 32 / lanes, each = HEIGHT < step ? 1 : HEIGHT / step;
    const uint i = lane / lanes;
    Chosen<K, TOKENS> tokens = x;
    float sums[each * TOKENS];
    rows<KIND, K, each, TOKENS>(words, part, row + i, tokens, sums, lane);
    EACH(r, each) EACH(t, TOKENS) {
      const uint n = i + r * step;
      if (lane % lanes == 0 && n < HEIGHT && row + n < part.rows && y[t]) y[t][n] = sums[r * TOKENS + t];
    }
  }
};

// y[slot, n] = W[its expert][n] . x[slot / SLOTS], SLOTS to a token; x [.., K] as the experts want it.
//   order: all slots, those of one expert side by side    expert: theirs, in that order    dims: how many there are
//   HEIGHT: rows of a simdgroup     TOKENS: slots of a threadgroup, each expert of theirs at a time
// groups: (blocks of rows, slots / TOKENS)
template <int K, int N, int SLOTS, int PARTS, int HEIGHT, int TOKENS, int THREADS, int... KINDS, class E, class O,
          class D>
METAL_FUNC void moe_experts(const device float* x, E expert, O order, D dims, const device uint* words,
                            const device uint* parts, device float* y, Place at) {
  const uint first = (at.group.x * (THREADS / 32) + at.simd) * HEIGHT;
  if (first >= N) return;
  const uint end = min((at.group.y + 1) * TOKENS, uint(dims[0]));
  for (uint begin = at.group.y * TOKENS, next; begin < end; begin = next) {
    const uint e = expert[begin];
    for (next = begin + 1; next < end && uint(expert[next]) == e; next++) {}
    ChosenRows<K, N, HEIGHT, TOKENS> product;
    product.words = words, product.lane = at.lane;
    EACH(t, TOKENS) {
      const ulong slot = order[min(begin + t, next - 1)];
      product.x.x[t] = x + slot / SLOTS * K;
      product.y[t] = begin + t < next ? y + slot * N + first : nullptr;
    }
    expert_rows<PARTS, HEIGHT, KINDS...>(parts + ulong(e) * (PARTS * 8), first, product);
  }
}

}  // namespace hm
