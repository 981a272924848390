// Tiles of our codes (csrc/core/kv_codecs.h): a lane has the words of its 32 terms.
#include "kv_level.metal"

namespace hm {

template <int BITS>
METAL_FUNC float tile_level(const thread uint* words, uint term) {
  const uint quad = term / 4, byte = 8 * (term % 4);
  if constexpr (BITS == 3) {
    return level<3>((words[quad / 4] >> (byte + 2 * (quad % 4)) & 3u) | (words[2] >> (byte + quad) & 1u) << 2);
  } else {
    return level<BITS>(words[quad * BITS / 8] >> (byte + BITS * (quad % (8 / BITS))) & ((1u << BITS) - 1u));
  }
}

}  // namespace hm
