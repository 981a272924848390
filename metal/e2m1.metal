// e2m1 and e2m1_gguf: numbers are 2^14 too small, which Factor puts right.
#include "weight.metal"

namespace hm {

// Codes in the upper four bits of both halves of t: halves with the same sign, exponent and mantissa.
METAL_FUNC float2 two_e2m1(uint t) {
  return float2(as_type<half2>((t & 0x80008000u) | (t & 0x70007000u) >> 3));
}

template <int SCALE>
struct Codes<e2m1, 4, SCALE> {
  METAL_FUNC void open(const device uint*, Part, uint) {}
  METAL_FUNC void eight(thread const uint* w, int i, thread float* v) const {
    EACH(j, 4) {
      const float2 n = two_e2m1(w[i] << (12 - 4 * j));
      v[j] = n.x, v[j + 4] = n.y;
    }
  }
};

// 16 bytes hold codes 0..15 in their lower halves, 16..31 above.
template <int SCALE>
struct Codes<e2m1_gguf, 4, SCALE> {
  METAL_FUNC void open(const device uint*, Part, uint) {}
  METAL_FUNC void eight(thread const uint* w, int i, thread float* v) const {
    const int up = i < 2 ? 0 : 4;
    EACH(j, 2) {
      const uint four = w[2 * (i % 2) + j];
      const float2 even = two_e2m1(four << (12 - up)), odd = two_e2m1(four << (4 - up));
      v[4 * j] = even.x, v[4 * j + 1] = odd.x, v[4 * j + 2] = even.y, v[4 * j + 3] = odd.y;
    }
  }
};

}  // namespace hm
