// Codes of a token as a bit stream, 32 columns (a chunk: BITS words) at a time.
#include "kv_page.metal"

namespace hm {

// Words of a chunk of tokens lane and lane + 32: [2][BITS]. Each lane has its own.
template <int BITS, int D>
METAL_FUNC void load_words(const device uint* page, uint chunk, thread uint* words, uint lane) {
  for (uint k = 0; k < 2; k++)
    for (int j = 0; j < BITS; j++) words[k * BITS + j] = page[((lane + 32 * k) * (D / 32) + chunk) * BITS + j];
}
template <int BITS>
METAL_FUNC uint stream_code(const thread uint* words, uint column) {
  const uint bit = column * BITS, shift = bit % 32;
  uint code = words[bit / 32] >> shift;
  if (shift + BITS > 32) code |= words[bit / 32 + 1] << (32 - shift);
  return code & ((1u << BITS) - 1u);
}

// A chunk of several tokens, a word in a lane: read once for the 32 columns, of which each lane then has one.
template <int BITS>
struct Chunk {
  static constexpr constant uint each = BITS == 3 ? 4 : BITS, tokens = 32 / each;
  uint word;
  template <int D>
  METAL_FUNC void load(const device uint* page, uint token, uint chunk, uint lane) {
    word = lane % each < BITS ? page[((token + lane / each) * (D / 32) + chunk) * BITS + lane % each] : 0;
  }
  METAL_FUNC uint code(uint i, uint lane) const {
    const uint bit = lane * BITS, at = i * each + bit / 32, shift = bit % 32;
    uint found = simd_shuffle(word, ushort(at)) >> shift;
    if constexpr (BITS == 3) {
      const uint next = simd_shuffle(word, ushort(min(at + 1, i * each + 2)));
      if (shift > 29) found |= next << (32 - shift);
    }
    return found & ((1u << BITS) - 1u);
  }
};

}  // namespace hm
