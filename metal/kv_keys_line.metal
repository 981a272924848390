// Scores of affine keys (64 columns of a token share scale and bias) and kivi's (32 tokens of a column do).
#include "kv_line.metal"

namespace hm {

template <int KIND, int D, int V>
METAL_FUNC void key_scores(const device uint* page, const device float*, const threadgroup float4* x,
                           const threadgroup float4* factors, thread float4* scores, uint lane) {
  constexpr int BITS = KIND % 32;
  float2 lines[2];
  for (int i = 0; i < 2 * V; i++) scores[i] = 0.0f;
  for (uint chunk = 0; chunk < D / 32; chunk++) {
    uint words[2 * BITS];
    load_words<BITS, D>(page, chunk, words, lane);
    for (uint k = 0; k < 2; k++) {
      if (is_kivi(KIND)) lines[k] = line_at<KIND, D>(page, k * D + 32 * chunk + lane, 2 * D);
      else if (chunk % 2 == 0) lines[k] = line_at<KIND, D>(page, (lane + 32 * k) * (D / 64) + chunk / 2, PAGE * D / 64);
    }
    for (uint i = 0; i < 32; i++) {
      for (int k = 0; k < 2; k++) {
        float2 line = lines[k];
        if (is_kivi(KIND)) line = float2(simd_shuffle(line.x, ushort(i)), simd_shuffle(line.y, ushort(i)));
        const float value = fma(line.x, float(stream_code<BITS>(words + k * BITS, i)), line.y);
        for (int v = 0; v < V; v++) scores[k * V + v] = fma(float4(value), x[(32 * chunk + i) * V + v], scores[k * V + v]);
      }
    }
  }
  for (int i = 0; i < 2 * V; i++) scores[i] *= factors[i % V];
}

}  // namespace hm
