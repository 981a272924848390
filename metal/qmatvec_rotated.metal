// qmatvec of tokens that every threadgroup rotates for itself: a launch less, for a few thousand additions.
#include "qmatvec.metal"
#include "rotate.metal"

namespace hm {

// For parts that want it, x rotated, but for 1 / rms, in threadgroup memory.
template <int IN, int K, int TOKENS, int COUNT, int SIMDS, class T>
struct Turned : Tokens<IN, K, TOKENS, COUNT, T> {
  using Flat = Tokens<IN, K, TOKENS, COUNT, T>;
  const threadgroup float *turned, *partial;  // TOKENS times padded(K); every simdgroup's sum of x squared

  template <bool ROTATED, bool WHOLE>
  METAL_FUNC void eight(int t, uint i, thread float* v) {
    if constexpr (ROTATED) {
      EACH(j, 8) v[j] = 0.0f;
      if (WHOLE || i < uint(K)) turned_eight(turned + t * padded(K), i, v);
    } else {
      Flat::template eight<false, WHOLE>(t, i, v);
    }
  }
  template <bool ROTATED, int LANES>
  METAL_FUNC float whole_square(int t) {
    if constexpr (!ROTATED) return Flat::template whole_square<false, LANES>(t);
    float square = 0.0f;
    for (int s = 0; s < SIMDS; s++) square += partial[t * SIMDS + s];
    return square;
  }
};

// x: not rotated. turned: TOKENS times padded(K). partial: TOKENS times simdgroups, or null without a norm.
template <int IN, int K, int N, int PARTS, int SLOTS, int COUNT, int TOKENS, int ROWS, int HEIGHT, int PASSES,
          int THREADS, int EPS, int BLOCK, int PRES, int POSTS, int... KINDS, class T, class E, class Y>
METAL_FUNC void qmatvec_rotated(const device T* x, const device float* gamma, const device float* pre,
                                const device float* post, const device uint* words, const device uint* parts, E expert,
                                const device Y* residual, device Y* y, threadgroup float* turned,
                                threadgroup float* partial, Place at) {
  EACH(t, TOKENS) {
    const uint n = at.group.y / SLOTS * TOKENS + t;
    const ulong token = COUNT ? min(n, uint(COUNT - 1)) : n;
    rotate<IN, K, BLOCK, PRES, POSTS, K, THREADS>(x + token * IN, gamma, pre, post, turned + t * padded(K),
                                                  gamma ? partial + t * (THREADS / 32) : nullptr, 0, at);
  }
  Turned<IN, K, TOKENS, COUNT, THREADS / 32, T> tokens;
  tokens.x = x, tokens.gamma = gamma, tokens.turned = turned, tokens.partial = partial;
  products<IN, K, N, PARTS, SLOTS, COUNT, TOKENS, ROWS, HEIGHT, PASSES, THREADS, EPS, KINDS...>(
      tokens, words, parts, expert, residual, y, at);
}

}  // namespace hm
