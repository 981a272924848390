// Values of codecs h2, h3, h4 and h8. A page's softened scores times the values' scales become 14 bits of their largest;
// their products with the levels are whole numbers: 8 tokens at a time below 2^24, which f32 adds exactly.
// A thread has columns; weights lie as [token][row], rows in fours (V float4).
#include "kv_tile.metal"

namespace hm {

// Column i of a thread.
template <int KIND>
METAL_FUNC uint column_of(uint i, Place at) { return at.index + 256 * i; }

// Softened scores of tokens lane and lane + 32 to weights; units: what a whole number is worth; noise: the sum of
// (weight * scale)^2.
template <int KIND, int D, int V, int WORTH>
METAL_FUNC void weigh(const device uint* page, thread float4* scores, thread float4* units, thread float4* noise, uint lane) {
  const device uint* scales = page + PAGE * D * (KIND % 32) / 32;
  const float2 nu(half_at(scales, lane), half_at(scales, lane + 32));
  for (int v = 0; v < V; v++) {
    for (int i = 0; i < 4; i++) {
      const float2 w = float2(scores[v][i], scores[V + v][i]) * nu;
      const float most = simd_max(max(w.x, w.y)), by = most > 1e-30f ? 16383.0f / most : 0.0f;
      noise[v][i] = simd_sum(fma(w.x, w.x, w.y * w.y));
      units[v][i] = most > 1e-30f ? most / 16383.0f * as_type<float>(WORTH) : 0.0f;
      scores[v][i] = float(int(min(fma(w.x, by, 0.5f), 16383.0f)));
      scores[V + v][i] = float(int(min(fma(w.y, by, 0.5f), 16383.0f)));
    }
  }
}

// sums += the page's values by their weights.
template <int KIND, int D, int V>
METAL_FUNC void page_values(const device uint* page, const device float*, const threadgroup float4* weights,
                            const threadgroup float4* units, thread float4* sums, Place at) {
  constexpr int BITS = KIND % 32;
  for (uint e = 0, c = at.index; c < D; e++, c += 256) {
    int4 whole[V];
    for (int v = 0; v < V; v++) whole[v] = 0;
    for (uint chunk = 0; chunk < 2; chunk++) {
      const device uint* tile = page + (c / 16 * 2 + chunk) * BITS * 16 + c % 16;
      uint words[BITS];
      for (int j = 0; j < BITS; j++) words[j] = tile[16 * j];
      for (uint eight = 0; eight < 32; eight += 8) {
        float4 part[V];
        for (int v = 0; v < V; v++) part[v] = 0.0f;
        for (uint term = eight; term < eight + 8; term++) {
          const float l = tile_level<BITS>(words, term);
          for (int v = 0; v < V; v++) part[v] = fma(float4(l), weights[(32 * chunk + term) * V + v], part[v]);
        }
        for (int v = 0; v < V; v++) whole[v] += int4(part[v]);
      }
    }
    for (int v = 0; v < V; v++) sums[e * V + v] = fma(float4(whole[v]), units[v], sums[e * V + v]);
  }
}

}  // namespace hm
