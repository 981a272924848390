// Scores of codecs h2, h3, h4 and h8: the query as signed bytes times the codes' levels. All of a sum is whole
// numbers below 2^24, so f32 adds them exactly, in any order: the CPU's integers.
//
// Rows of the query lie side by side: x[column][row], rows in fours (V float4). A lane has two tokens of a page.
#include "kv_row.metal"
#include "kv_tile.metal"

namespace hm {

// Row r of a query as bytes in floats to x; returns their unit, the same in every lane. real: else zeros.
template <int D, int V, class T>
METAL_FUNC float query_row(const device T* q, bool real, const device float* signs, float root, threadgroup float* x,
                           uint r, uint lane) {
  constexpr int N = D / 32;
  float v[N];
  for (int i = 0; i < N; i++) v[i] = real ? float(q[lane + 32 * i]) * signs[lane + 32 * i] : 0.0f;
  walsh_hadamard<N>(v, lane);
  for (int i = 0; i < N; i++) v[i] *= root;
  const float most = row_most<N>(v), unit = most > 0.0f ? most / 127.0f : 1.0f;
  for (int i = 0; i < N; i++) x[(lane + 32 * i) * 4 * V + r] = float(to_level(v[i] / unit));
  return unit;
}

// Sums of tokens lane and lane + 32 of a page: [2][V].
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

// Rows of a group of heads to x; factors: what a sum times its token's scale is worth.
template <int CODEC, int D, int R, int V, int ROOT, class T>
METAL_FUNC void load_query(const device T* q, const device float* signs, threadgroup float4* x, threadgroup float4* factors,
                           Place at) {
  const float root = as_type<float>(ROOT), worth = CODEC == kv_h8 ? 1.0f : root / kappa(code_bits(CODEC));
  for (uint r = at.simd; r < 4 * V; r += 8) {
    const float unit = query_row<D, V>(q + r * D, r < R, signs, root, (threadgroup float*)x, r, at.lane);
    if (at.lane == 0) ((threadgroup float*)factors)[r] = unit * worth * root;
  }
}

template <int CODEC, int D, int V, int SCALE>
METAL_FUNC void key_scores(const device uint* page, const device float*, const threadgroup float4* x,
                           const threadgroup float4* factors, thread float4* scores, uint lane) {
  page_sums<code_bits(CODEC), D, V>(page, x, scores, lane);
  for (int k = 0; k < 2; k++) {
    const float scale = half_at(page + code_words(CODEC, D), lane + 32 * k);
    for (int v = 0; v < V; v++) scores[k * V + v] = scores[k * V + v] * scale * factors[v];
  }
}

}  // namespace hm
