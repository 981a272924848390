// First half of a mixture of experts: inner = silu(gate) * up of a token's experts and of the shared one.
#include "moe_staged.metal"

namespace hm {

// inner[t, s, i] = silu(x[t] . gate[i]) * (x[t] . up[i]) of the s-th expert of token t; s = TOP_K: the shared one.
//   logits [t, EXPERTS + 1]: the router's, then the shared gate's    parts: of EXPERTS + 1 experts, the shared one last
//   IN: columns of x      INNER, SHARED: rows of gate and of up of an expert, of the shared one
//   HEIGHT: rows of a simdgroup      EPS: bits of the norm's         KINDS: of the parts
// groups: (blocks of rows, s, t)
template <int IN, int INNER, int SHARED, int EXPERTS, int TOP_K, int PARTS, int HEIGHT, int THREADS, int EPS,
          int... KINDS, class Logits>
METAL_FUNC void moe_gate_up(const device float* x, const device float* gamma, Logits logits, const device uint* words,
                            const device uint* parts, device float* inner, threadgroup float* staged,
                            threadgroup float* partial, threadgroup float* terms, Place at) {
  stage<IN, THREADS>(x + ulong(at.group.z) * IN, gamma, staged, partial, at);
  staged_gate_up<IN, IN, INNER, SHARED, EXPERTS, TOP_K, PARTS, HEIGHT, THREADS, EPS, KINDS...>(
      gamma != nullptr, logits, words, parts, inner, staged, partial, terms, at);
}

}  // namespace hm
