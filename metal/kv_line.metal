// Scales and biases of affine and kivi pages: two 16-bit numbers, all biases behind all scales.
#include "kv_words.metal"

namespace hm {

constexpr bool is_kivi(int kind) { return kind / 32 > 10; }  // else affine

template <int KIND, int D>
METAL_FUNC float2 line_at(const device uint* page, uint i, uint biases) {
  const device ushort* scales = (const device ushort*)(page + PAGE * D * (KIND % 32) / 32);
  const ushort scale = scales[i], bias = scales[biases + i];
  if constexpr (is_kivi(KIND)) return float2(float(as_type<half>(scale)), float(as_type<half>(bias)));
  return float2(as_type<float>(uint(scale) << 16), as_type<float>(uint(bias) << 16));
}

}  // namespace hm
