// Second half of a mixture of experts: the weighted sum of a token's experts, the shared one and the residual.
#include "moe_rows.metal"
#include "moe_top.metal"

namespace hm {

constexpr int log2_of(int n) { return n > 1 ? 1 + log2_of(n / 2) : 0; }

// A row of K numbers in registers: a lane has the pieces of COLUMNS that its rows' codes are multiplied with.
template <int K, int COLUMNS, int LANES>
struct Held {
  enum { PIECES = (K + COLUMNS * LANES - 1) / (COLUMNS * LANES) };
  float v[PIECES * COLUMNS];

  METAL_FUNC uint column(uint i, uint lane) const {
    return COLUMNS * (i / COLUMNS * LANES + lane % LANES) + i % COLUMNS;
  }
  template <bool ROTATED, bool WHOLE>
  METAL_FUNC void eight(int, uint i, thread float* to) const {
    EACH(j, 8) to[j] = v[i / (COLUMNS * LANES) * COLUMNS + i % COLUMNS + j];
  }
  // The step of H that adds numbers H apart, and the steps after it: rotate.metal's sums in its order.
  template <int H, int BLOCK>
  METAL_FUNC void turn(uint lane) {
    constexpr uint end = BLOCK ? K : K & -(2 * H), begin = BLOCK ? 0 : K & -(4 * H);  // begin: it is their last step
    constexpr int log = log2_of(2 * H), apart = H < COLUMNS ? H : H / LANES;           // apart: in v
    constexpr float root = float(1 << log / 2) * (log % 2 ? 1.41421356237309504880f : 1.0f);
    constexpr float inverse = (log % 2 ? 0.70710678118654752440f : 1.0f) / float(1 << log / 2);
    EACH(i, PIECES * COLUMNS) {
      const bool here = column(i, lane) < end;
      if constexpr (H >= COLUMNS && H < COLUMNS * LANES) {
        const float other = simd_shuffle_xor(v[i], ushort(H / COLUMNS));
        if (here) v[i] = lane & (H / COLUMNS) ? other - v[i] : v[i] + other;
      } else if (here && !(i & apart)) {
        const float a = v[i], b = v[i + apart];
        v[i] = a + b, v[i + apart] = a - b;
      }
    }
    if constexpr (BLOCK ? 2 * H == BLOCK : (K & 2 * H) != 0) {
      EACH(i, PIECES * COLUMNS)
        if (column(i, lane) >= begin && column(i, lane) < end) v[i] = BLOCK ? v[i] / root : v[i] * inverse;
    }
    if constexpr (4 * H <= (BLOCK ? BLOCK : K)) turn<2 * H, BLOCK>(lane);
  }
};

// Reads a row of IN numbers in device memory, rotated for kinds that want that.
template <int IN, int K, int BLOCK, int PRES, int POSTS>
struct Inner {
  const device float *x, *pre, *post;

  template <int KIND>
  METAL_FUNC auto read(uint lane) const {
    constexpr bool rotated = Kind<KIND>::rotated && BLOCK >= 0;
    constexpr int columns = Kind<KIND>::columns, k = rotated ? K : IN;
    Held<k, columns, lanes_of(k, columns)> held;
    constexpr int size = held.PIECES * columns;
    UNROLL for (int i = 0; i < size; i += 8) {
      const uint at = held.column(i, lane);
      EACH(j, 8) held.v[i + j] = 0.0f;
      if (at < IN) load_eight<IN>(x, at, held.v + i);
    }
    if constexpr (rotated) {
      if (pre) EACH(i, size) held.v[i] *= pre[held.column(i, lane) % PRES];
      if constexpr ((BLOCK ? BLOCK : K) > 1) held.template turn<1, BLOCK>(lane);
      if (post) EACH(i, size) held.v[i] *= post[held.column(i, lane) % POSTS];
    }
    return held;
  }
};

// y[t, n] = residual[t, n] + sum_s weight_s down_s[n] . inner[t, s] + sigmoid(shared gate) shared[n] . inner[t, TOP_K],
// in this order; weight_s: the s-th share of moe_top.metal.
//   logits, parts: as in moe_gate_up     IN, K: columns of an expert's rows as they are and rotated; SHARED_ of the shared
// A threadgroup has HEIGHT rows, its simdgroups the experts s, s + THREADS / 32, ...; groups: (blocks of rows, t)
template <int N, int IN, int K, int SHARED_IN, int SHARED_K, int EXPERTS, int TOP_K, int PARTS, int NORMALIZE,
          int HEIGHT, int OWN, int THREADS, int BLOCK, int PRES, int POSTS, int... KINDS, class Logits>
METAL_FUNC void moe_down(const device float* inner, Logits all_logits, const device float* pre,
                         const device float* post, const device uint* words, const device uint* parts,
                         const device float* residual, device float* y, threadgroup float* terms, Place at) {
  constexpr uint width = ((IN > SHARED_IN ? IN : SHARED_IN) + 7) / 8 * 8, simds = THREADS / 32;
  const uint t = at.group.y, first = at.group.x * HEIGHT;
  const auto logits = all_logits + t * (EXPERTS + 1);
  const device float* x = inner + ulong(t) * (TOP_K + 1) * width;

  Choice<EXPERTS, TOP_K, NORMALIZE> choice;
  choice.open(logits, at.lane);
  for (uint s = at.simd; s < TOP_K; s += simds) {
    PartRows<IN, K, HEIGHT, Inner<IN, K, BLOCK, PRES, POSTS>> product{
        words, {x + s * width, pre, post}, simd_shuffle(choice.share, ushort(s)), terms + s * HEIGHT, at.lane};
    const uint e = simd_shuffle(choice.expert, ushort(s));
    expert_rows<PARTS, HEIGHT, KINDS...>(parts + ulong(e) * (PARTS * 8), first, product);
  }
  for (uint i = at.simd * OWN; i < HEIGHT; i += simds * OWN) {  // OWN rows of the shared expert
    PartRows<SHARED_IN, SHARED_K, OWN, Inner<SHARED_IN, SHARED_K, BLOCK, PRES, POSTS>> product{
        words, {x + TOP_K * width, pre, post}, sigmoid(logits[EXPERTS]), terms + TOP_K * HEIGHT + i, at.lane};
    expert_rows<PARTS, OWN, KINDS...>(parts + EXPERTS * PARTS * 8, first + i, product);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = at.index; i < HEIGHT && first + i < N; i += THREADS) {
    float sum = 0.0f;
    for (uint s = 0; s <= TOP_K; s++) sum += terms[s * HEIGHT + i];
    const ulong to = ulong(t) * N + first + i;
    y[to] = residual ? residual[to] + sum : sum;
  }
}

}  // namespace hm
