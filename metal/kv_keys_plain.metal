// Scores of fp8 and bf16 keys.
#include "kv_plain.metal"

namespace hm {

template <int KIND, int D, int V>
METAL_FUNC void key_scores(const device uint* page, const device float*, const threadgroup float4* x,
                           const threadgroup float4* factors, thread float4* scores, uint lane) {
  constexpr int BITS = KIND % 32;
  for (int i = 0; i < 2 * V; i++) scores[i] = 0.0f;
  for (uint chunk = 0; chunk < D / 32; chunk++) {
    uint words[2 * BITS];
    load_words<BITS, D>(page, chunk, words, lane);
    for (uint i = 0; i < 32; i++) {
      for (int k = 0; k < 2; k++) {
        const float value = plain_number<BITS>(stream_code<BITS>(words + k * BITS, i));
        for (int v = 0; v < V; v++) scores[k * V + v] = fma(float4(value), x[(32 * chunk + i) * V + v], scores[k * V + v]);
      }
    }
  }
  for (int i = 0; i < 2 * V; i++) scores[i] *= factors[i % V];
}

}  // namespace hm
