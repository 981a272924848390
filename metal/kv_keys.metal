// Scores of codecs h2, h3, h4 and h8: the query as signed bytes times the codes' levels. All of a sum is whole
// numbers below 2^24, so f32 adds them exactly, in any order: the CPU's integers.
#include "kv_tile.metal"

namespace hm {

// Sums of tokens lane and lane + 32 of a page, [2][V]. Rows of the query lie side by side, x[column][row], in fours
// (V float4).
template <int BITS, int D, int V>
METAL_FUNC void page_sums(const device uint* page, const threadgroup float4* x, thread float4* sums, uint lane) {
  for (int i = 0; i < 2 * V; i++) sums[i] = 0.0f;
  for (uint chunk = 0; chunk < D / 32; chunk++) {
    uint words[2 * BITS];
    for (uint k = 0; k < 2; k++) {
      const device uint* tile = page + ((lane / 16 + 2 * k) * (D / 32) + chunk) * BITS * 16 + lane % 16;
      for (int j = 0; j < BITS; j++) words[k * BITS + j] = tile[16 * j];
    }
    for (uint term = 0; term < 32; term++) {
      const threadgroup float4* q = x + (32 * chunk + term) * V;
      for (int k = 0; k < 2; k++) {
        const float l = tile_level<BITS>(words + k * BITS, term);
        for (int v = 0; v < V; v++) sums[k * V + v] = fma(float4(l), q[v], sums[k * V + v]);
      }
    }
  }
}

// What they are worth: factors are of rows.
template <int KIND, int D, int V>
METAL_FUNC void key_scores(const device uint* page, const device float*, const threadgroup float4* x,
                           const threadgroup float4* factors, thread float4* scores, uint lane) {
  page_sums<KIND % 32, D, V>(page, x, scores, lane);
  for (int k = 0; k < 2; k++) {
    const float scale = half_at(page + PAGE * D * (KIND % 32) / 32, lane + 32 * k);
    for (int v = 0; v < V; v++) scores[k * V + v] = scores[k * V + v] * scale * factors[v];
  }
}

}  // namespace hm
