// Scores of mlx-swift-lm's codecs: the turned query times centroids, times the token's norm.
#include "kv_words.metal"

namespace hm {

template <int KIND, int D, int V>
METAL_FUNC void key_scores(const device uint* page, const device float* book, const threadgroup float4* x,
                           const threadgroup float4* factors, thread float4* scores, uint lane) {
  constexpr int BITS = KIND % 32;
  const float centroid = book[lane % 16];  // the table lies in lanes
  for (int i = 0; i < 2 * V; i++) scores[i] = 0.0f;
  for (uint chunk = 0; chunk < D / 32; chunk++) {
    uint words[2 * BITS];
    load_words<BITS, D>(page, chunk, words, lane);
    for (uint i = 0; i < 32; i++) {
      for (int k = 0; k < 2; k++) {
        const float value = simd_shuffle(centroid, ushort(stream_code<BITS>(words + k * BITS, i)));
        for (int v = 0; v < V; v++) scores[k * V + v] = fma(float4(value), x[(32 * chunk + i) * V + v], scores[k * V + v]);
      }
    }
  }
  for (int k = 0; k < 2; k++) {
    const float norm = as_type<float>(page[PAGE * D * BITS / 32 + lane + 32 * k]);
    for (int v = 0; v < V; v++) scores[k * V + v] = scores[k * V + v] * norm * factors[v];
  }
}

}  // namespace hm
