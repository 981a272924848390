// Codes as other software stores them: a bit stream a token, the lowest bit first.
#include "kv_codec.metal"

namespace hm {

// The codes of a row, one in each of its lanes' registers, to its words.
template <int BITS, int N>
METAL_FUNC void put_stream(const thread uint* codes, device uint* row, uint lane) {
  const uint bit = lane * BITS, shift = bit % 32;
  for (int i = 0; i < N; i++) {
    for (uint j = 0; j < BITS; j++) {
      uint word = j == bit / 32 ? codes[i] << shift : 0;
      if (j == bit / 32 + 1 && shift + BITS > 32) word = codes[i] >> (32 - shift);
      word = simd_or(word);
      if (lane == 0) row[i * BITS + j] = word;
    }
  }
}

}  // namespace hm
