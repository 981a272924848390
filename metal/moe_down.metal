// Second half of a mixture of experts: the weighted sum of a token's experts, the shared one and the residual.
#include "moe_weighted.metal"

namespace hm {

// Reads a row of IN numbers as they are.
template <int IN>
struct Inner {
  const device float* x;

  METAL_FUNC Inner at(const device float* p) const { return {p}; }
  template <int KIND>
  METAL_FUNC Inner read(uint) const { return *this; }
  template <bool ROTATED, bool WHOLE>
  METAL_FUNC void eight(int, uint i, thread float* v) const {
    EACH(j, 8) v[j] = 0.0f;
    if (WHOLE || i < IN) load_eight<IN>(x, i, v);
  }
};

template <int N, int IN, int SHARED_IN, int EXPERTS, int TOP_K, int PARTS, int NORMALIZE, int HEIGHT, int OWN,
          int THREADS, int... KINDS, class Logits>
METAL_FUNC void moe_down(const device float* inner, Logits logits, const device uint* words, const device uint* parts,
                         const device float* residual, device float* y, threadgroup float* terms, Place at) {
  weighted<N, IN, IN, SHARED_IN, SHARED_IN, EXPERTS, TOP_K, PARTS, NORMALIZE, HEIGHT, OWN, THREADS, KINDS...>(
      Inner<IN>{inner}, Inner<SHARED_IN>{inner}, logits, words, parts, residual, y, terms, at);
}

}  // namespace hm
