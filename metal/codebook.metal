// codebook: numbers are entries of an f32 table. An indexed table would live in memory, and Apple's GPUs shuffle
// registers only by quads: a tree of selects does neither.
#include "weight.metal"

namespace hm {

template <int BITS, int SCALE>
struct Codes<codebook, BITS, SCALE> {
  float entry[1 << BITS];

  METAL_FUNC void open(const device uint* words, Part part, uint lane) {
    constexpr uint size = 1 << BITS;
    // read once and handed round: a compiler makes a select of two loads a load of a selected address
    const float mine = lane < size ? as_type<float>(piece(words, part.table)[lane]) : 0.0f;
    EACH(i, size) entry[i] = simd_shuffle(mine, ushort(i));
  }
  METAL_FUNC void eight(thread const uint* w, int i, thread float* v) const {
    EACH(j, 8) {
      float level[1 << BITS];
      EACH(e, 1 << BITS) level[e] = entry[e];
      EACH(b, BITS) {
        const int at = (8 * i + j) * BITS + b;
        const bool bit = w[at / 32] & 1u << at % 32;
        EACH(e, 1 << (BITS - 1 - b)) level[e] = select(level[2 * e], level[2 * e + 1], bit);
      }
      v[j] = level[0];
    }
  }
};

}  // namespace hm
