// Which experts a token goes through, found by every simdgroup for itself.
#include "weight.metal"

namespace hm {

METAL_FUNC float sigmoid(float v) { return 1.0f / (1.0f + precise::exp(-v)); }

// Logits as integers of the same order, NaN included: whatever they are, one of them is largest.
METAL_FUNC uint ordered(float v) {
  const uint u = as_type<uint>(v + 0.0f);  // -0 as 0
  return u >> 31 ? ~u : u | 0x80000000u;
}

// A token's experts from the largest logit on, the lower number first among equals.
template <int EXPERTS>
struct Ranking {
  enum { OWN = (EXPERTS + 31) / 32 };  // of a lane: lane, lane + 32, ...
  uint key[OWN], taken;                 // taken: a bit for each

  template <class Logits>
  METAL_FUNC void open(Logits logits, uint lane) {
    taken = 0;
    EACH(j, OWN) key[j] = 32 * j + lane < EXPERTS ? ordered(logits[32 * j + lane]) : 0;
  }
  METAL_FUNC uint next(uint lane) {
    uint most = 0, expert = EXPERTS;
    EACH(j, OWN) {
      const bool free = 32 * j + lane < EXPERTS && !(taken >> j & 1u);
      if (free && (expert == EXPERTS || key[j] > most)) most = key[j], expert = 32 * j + lane;
    }
    expert = simd_min(most == simd_max(most) ? expert : uint(EXPERTS));
    if (expert % 32 == lane) taken |= 1u << expert / 32;
    return expert;
  }
};

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
