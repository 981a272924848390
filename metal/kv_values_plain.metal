// Values in fp8 and bf16.
#include "kv_plain.metal"

namespace hm {

template <int KIND>
METAL_FUNC uint column_of(uint i, Place at) { return at.index + 256 * i; }

template <int KIND, int D, int V, int WORTH>
METAL_FUNC void weigh(const device uint*, thread float4* scores, thread float4*, thread float4*, uint) {
  for (int i = 0; i < 2 * V; i++) scores[i] *= as_type<float>(WORTH);
}

template <int KIND, int D, int V>
METAL_FUNC void page_values(const device uint* page, const device float*, const threadgroup float4* weights,
                            const threadgroup float4*, thread float4* sums, Place at) {
  Chunk<KIND % 32> some;
  for (uint e = 0, chunk = at.simd; chunk < D / 32; e++, chunk += 8) {
    for (uint t = 0; t < PAGE; t += some.tokens) {
      some.template load<D>(page, t, chunk, at.lane);
      for (uint i = 0; i < some.tokens; i++) {
        const float value = plain_number<KIND % 32>(some.code(i, at.lane));
        for (int v = 0; v < V; v++) sums[e * V + v] = fma(float4(value), weights[(t + i) * V + v], sums[e * V + v]);
      }
    }
  }
}

}  // namespace hm
