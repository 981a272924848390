// Numbers that stand for themselves: fp8 (E4M3) but for one scale, bf16.
#include "kv_words.metal"

namespace hm {

template <int BITS>
METAL_FUNC float plain_number(uint code) {
  if (BITS == 16) return as_type<float>(code << 16);
  if ((code & 0x7fu) == 0x7fu) return as_type<float>(0x7fc00000u);
  return float(as_type<half>(ushort((code & 0x80u) << 8 | (code & 0x7fu) << 7))) * 256.0f;  // a half with fewer bits
}

}  // namespace hm
