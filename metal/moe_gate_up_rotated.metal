// moe_gate_up for experts that read x rotated: every threadgroup rotates it for itself.
#include "moe_staged.metal"
#include "rotate.metal"

namespace hm {

// K: columns of a rotated row    TURNED, SHARED_TURNED: the experts read x rotated, the shared one does
template <int IN, int INNER, int SHARED, int EXPERTS, int TOP_K, int PARTS, int HEIGHT, int THREADS, int EPS, int K,
          int TURNED, int SHARED_TURNED, int BLOCK, int PRES, int POSTS, int... KINDS, class Logits>
METAL_FUNC void moe_gate_up_rotated(const device float* all_x, const device float* gamma, const device float* pre,
                                    const device float* post, Logits logits, const device uint* words,
                                    const device uint* parts, device float* inner, threadgroup float* staged,
                                    threadgroup float* partial, threadgroup float* terms, Place at) {
  const device float* x = all_x + ulong(at.group.z) * IN;
  if (at.group.y < TOP_K ? TURNED : SHARED_TURNED)
    rotate<IN, K, BLOCK, PRES, POSTS, K, THREADS>(x, gamma, pre, post, staged, partial, 0, at);
  else
    stage<IN, THREADS>(x, gamma, staged, partial, at);
  staged_gate_up<IN, K, INNER, SHARED, EXPERTS, TOP_K, PARTS, HEIGHT, THREADS, EPS, KINDS...>(
      gamma != nullptr, logits, words, parts, inner, staged, partial, terms, at);
}

}  // namespace hm
