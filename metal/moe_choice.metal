// Which experts a token goes through, and their shares.
#include "moe_top.metal"

namespace hm {

// Lane s has the s-th expert of TOP_K and its share: softmax(logits), over the sum of all shares where NORMALIZE.
template <int EXPERTS, int TOP_K, int NORMALIZE>
struct Choice {
  uint expert;
  float share;

  template <class Logits>
  METAL_FUNC void open(Logits logits, uint lane) {
    Ranking<EXPERTS> ranking;
    ranking.open(logits, lane);
    expert = 0;
    float top = 0.0f, total = 0.0f;
    for (uint s = 0; s < TOP_K; s++) {
      const uint next = ranking.next(lane);
      if (s == 0) top = logits[next];
      if (s == lane) expert = next;
    }
    for (uint e = lane; e < EXPERTS; e += 32) total += precise::exp(logits[e] - top);
    share = lane < TOP_K ? precise::exp(logits[expert] - top) : 0.0f;
    share /= simd_sum(total);
    if (NORMALIZE) share /= simd_sum(share);
  }
};

}  // namespace hm
