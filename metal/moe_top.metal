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

}  // namespace hm
