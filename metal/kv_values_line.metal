// Values of affine codecs (64 columns of a token share scale and bias, and are of one simdgroup) and kivi's (32).
#include "kv_line.metal"

namespace hm {

template <int KIND>
METAL_FUNC uint column_of(uint i, Place at) { return is_kivi(KIND) ? at.index + 256 * i : 64 * at.simd + 32 * i + at.lane; }

template <int KIND, int D, int V, int WORTH>
METAL_FUNC void weigh(const device uint*, thread float4*, thread float4*, thread float4*, uint) {}

template <int KIND, int D, int V>
METAL_FUNC void page_values(const device uint* page, const device float*, const threadgroup float4* weights,
                            const threadgroup float4*, thread float4* sums, Place at) {
  constexpr uint SHARE = is_kivi(KIND) ? 1 : 2, GROUPS = D / 32 / SHARE;
  Chunk<KIND % 32> some;
  float2 lines[2];  // of tokens lane and lane + 32
  for (uint e = 0; e < (is_kivi(KIND) ? (D + 255) / 256 : 2); e++) {
    const uint chunk = is_kivi(KIND) ? at.simd + 8 * e : 2 * at.simd + e;
    if (chunk >= D / 32) break;
    for (uint k = 0; k < 2 && (e == 0 || is_kivi(KIND)); k++)
      lines[k] = line_at<KIND, D>(page, (at.lane + 32 * k) * GROUPS + chunk / SHARE, PAGE * GROUPS);
    for (uint t = 0; t < PAGE; t += some.tokens) {
      some.template load<D>(page, t, chunk, at.lane);
      const float2 line = t < 32 ? lines[0] : lines[1];
      for (uint i = 0; i < some.tokens; i++) {
        const ushort from = (t + i) % 32;
        const float value = fma(simd_shuffle(line.x, from), float(some.code(i, at.lane)), simd_shuffle(line.y, from));
        for (int v = 0; v < V; v++) sums[e * V + v] = fma(float4(value), weights[(t + i) * V + v], sums[e * V + v]);
      }
    }
  }
}

}  // namespace hm
