// The experts of many tokens: expert[t, TOP_K] and share[t, TOP_K + 1], the last the shared expert's.
#include "moe_choice.metal"

namespace hm {

// logits [t, EXPERTS + 1]: the router's, then the shared gate's. A simdgroup has a token; groups: (t)
template <int EXPERTS, int TOP_K, int NORMALIZE, class Logits>
METAL_FUNC void moe_route(Logits all_logits, device int* expert, device float* share, Place at) {
  const ulong t = at.group.x;
  const auto logits = all_logits + t * (EXPERTS + 1);
  Choice<EXPERTS, TOP_K, NORMALIZE> choice;
  choice.open(logits, at.lane);
  if (at.lane < TOP_K) expert[t * TOP_K + at.lane] = choice.expert, share[t * (TOP_K + 1) + at.lane] = choice.share;
  if (at.lane == 0) share[t * (TOP_K + 1) + TOP_K] = sigmoid(logits[EXPERTS]);
}

}  // namespace hm
