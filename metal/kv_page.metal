// Pages of 64 tokens of one head, keys or values, as words: codes, then scales.
#include "place.metal"

namespace hm {

constexpr constant uint PAGE = 64;

METAL_FUNC float half_at(const device uint* scales, uint i) { return float(((const device half*)scales)[i]); }

}  // namespace hm
