// plain: the numbers themselves. They have neither scale nor bias.
#include "weight.metal"

namespace hm {

template <int BITS, int SCALE>
struct Codes<plain, BITS, SCALE> {
  METAL_FUNC void open(const device uint*, Part, uint) {}
  METAL_FUNC void eight(thread const uint* w, int i, thread float* v) const {
    EACH(j, 8)
      v[j] = number<SCALE>(BITS == 32 ? w[8 * i + j] : w[(8 * i + j) / 2] >> 16 * (j % 2) & 0xffffu);
  }
};

}  // namespace hm
