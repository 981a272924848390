// linear and linear_signed: numbers are codes, counted from the middle.
#include "weight.metal"

namespace hm {

template <int BITS>
struct Counts {
  METAL_FUNC void open(const device uint*, Part, uint) {}
  METAL_FUNC void eight(thread const uint* w, int i, thread float* v) const {
    constexpr bool straddle = 32 % BITS != 0;
    constexpr uint top = BITS == 2 ? 0xaaaaaaaau : BITS == 4 ? 0x88888888u : 0x80808080u;  // of every code
    EACH(j, 8) {
      const int at = (8 * i + j) * BITS, word = at / 32, bit = at % 32;
      if constexpr (straddle) {
        uint code = w[word] >> bit;
        if (bit + BITS > 32) code |= w[word + 1] << (32 - bit);
        v[j] = float(int(code & ((1u << BITS) - 1u)) - (1 << (BITS - 1)));
      } else {
        v[j] = float(extract_bits(int(w[word] ^ top), uint(bit), uint(BITS)));  // its top bit is a sign now
      }
    }
  }
};
template <int BITS, int SCALE>
struct Codes<linear, BITS, SCALE> : Counts<BITS> {};
template <int BITS, int SCALE>
struct Codes<linear_signed, BITS, SCALE> : Counts<BITS> {};

}  // namespace hm
