// Values of mlx-swift-lm's codecs: a softened score takes the token's norm, centroids are added up by it.
#include "kv_words.metal"

namespace hm {

template <int KIND>
METAL_FUNC uint column_of(uint i, Place at) { return at.index + 256 * i; }

template <int KIND, int D, int V, int WORTH>
METAL_FUNC void weigh(const device uint* page, thread float4* scores, thread float4*, thread float4*, uint lane) {
  const device uint* norms = page + PAGE * D * (KIND % 32) / 32;
  for (int k = 0; k < 2; k++) {
    const float norm = as_type<float>(norms[lane + 32 * k]);
    for (int v = 0; v < V; v++) scores[k * V + v] *= norm;
  }
}

template <int KIND, int D, int V>
METAL_FUNC void page_values(const device uint* page, const device float* book, const threadgroup float4* weights,
                            const threadgroup float4*, thread float4* sums, Place at) {
  const float centroid = book[at.lane % 16];
  Chunk<KIND % 32> some;
  for (uint e = 0, chunk = at.simd; chunk < D / 32; e++, chunk += 8) {
    for (uint t = 0; t < PAGE; t += some.tokens) {
      some.template load<D>(page, t, chunk, at.lane);
      for (uint i = 0; i < some.tokens; i++) {
        const float value = simd_shuffle(centroid, ushort(some.code(i, at.lane)));
        for (int v = 0; v < V; v++) sums[e * V + v] = fma(float4(value), weights[(t + i) * V + v], sums[e * V + v]);
      }
    }
  }
}

}  // namespace hm
