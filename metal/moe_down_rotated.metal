// moe_down for experts that read their inner state rotated: every simdgroup turns it in its registers.
#include "moe_weighted.metal"

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

// Reads a row of IN numbers, rotated for kinds that want that.
template <int IN, int K, int BLOCK, int PRES, int POSTS>
struct Turned {
  const device float *x, *pre, *post;

  METAL_FUNC Turned at(const device float* p) const { return {p, pre, post}; }

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

// BLOCK, PRES, POSTS: of the rotation    K, SHARED_K: columns of rotated rows, of the experts and of the shared one
template <int N, int IN, int SHARED_IN, int EXPERTS, int TOP_K, int PARTS, int NORMALIZE, int HEIGHT, int OWN,
          int THREADS, int K, int SHARED_K, int BLOCK, int PRES, int POSTS, int... KINDS, class Logits>
METAL_FUNC void moe_down_rotated(const device float* inner, const device float* pre, const device float* post,
                                 Logits logits, const device uint* words, const device uint* parts,
                                 const device float* residual, device float* y, threadgroup float* terms, Place at) {
  const Turned<IN, K, BLOCK, PRES, POSTS> routed{inner, pre, post};
  const Turned<SHARED_IN, SHARED_K, BLOCK, PRES, POSTS> shared{inner, pre, post};
  weighted<N, IN, K, SHARED_IN, SHARED_K, EXPERTS, TOP_K, PARTS, NORMALIZE, HEIGHT, OWN, THREADS, KINDS...>(
      routed, shared, logits, words, parts, residual, y, terms, at);
}

}  // namespace hm
