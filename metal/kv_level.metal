// Levels of our codebooks.
#include "kv_page.metal"

namespace hm {

// Four to a word, a byte each: no table in memory is read.
template <int BITS>
METAL_FUNC float level(uint code) {
  uint four = 0x5a1be5a6u;
  if (BITS == 3) four = code & 4u ? 0x58371f0au : 0xf6e1c9a8u;
  if (BITS == 4) four = code & 8u ? (code & 4u ? 0x684f3e30u : 0x24190f05u) : (code & 4u ? 0xfbf1e7dcu : 0xd0c2b198u);
  return BITS == 8 ? float(int(code) - 128) : float(int(four << (24u - 8u * (code & 3u))) >> 24);
}
// Levels per deviation.
constexpr float kappa(int bits) { return bits == 2 ? 59.59375f : bits == 3 ? 40.90625f : 38.140625f; }

}  // namespace hm
