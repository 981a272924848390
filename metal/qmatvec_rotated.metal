// qmatvec of tokens that every threadgroup rotates for itself: a launch less, for a few thousand additions.
#include "qmatvec.metal"
#include "rotate.metal"

namespace hm {

// x: not rotated. turned: TOKENS times padded(K). partial: TOKENS times simdgroups, or null without a norm.
template <int IN, int K, int N, int PARTS, int SLOTS, int COUNT, int TOKENS, int ROWS, int HEIGHT, int PASSES,
          int THREADS, int EPS, int BLOCK, int PRES, int POSTS, int... KINDS, class T, class E, class Y>
METAL_FUNC void qmatvec_rotated(const device T* x, const device float* gamma, const device float* pre,
                                const device float* post, const device uint* words, const device uint* parts, E expert,
                                const device Y* residual, device Y* y, threadgroup float* turned,
                                threadgroup float* partial, Place at) {
  const Tokens<IN, K, TOKENS, COUNT, T> tokens{x, gamma, turned};
  EACH(t, TOKENS) {
    const uint n = at.group.y / SLOTS * TOKENS + t;
    const ulong token = COUNT ? min(n, uint(COUNT - 1)) : n;
    rotate<IN, K, BLOCK, PRES, POSTS, K, THREADS>(x + token * IN, gamma, pre, post, turned + t * padded(K),
                                               gamma ? partial + t * (THREADS / 32) : nullptr, 0, at);
  }
  products<IN, K, N, PARTS, SLOTS, COUNT, TOKENS, ROWS, HEIGHT, PASSES, THREADS, EPS, KINDS...>(
      tokens, partial, words, parts, expert, residual, y, at);
}

}  // namespace hm
