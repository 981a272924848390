// What is between the projections of attention and its cache: RMSNorm and positions of queries and keys, a simdgroup
// each head of a token. Meaning: the first half of reference.attention.
#include "kv_query.metal"

namespace hm {

struct Nothing {};

// A head in registers, normed and turned. Pairs are (i, i + ROT / 2); `row` is the simdgroup's own.
template <int N, int ROT, int EPS, int STRETCH, class P>
METAL_FUNC void turn_head(thread float* v, const device float* norm, P freqs, float position,
                          threadgroup float* row, uint lane) {
  float squares = 0.0f;
  for (int i = 0; i < N; i++) squares = fma(v[i], v[i], squares);
  const float inverse = 1.0f / precise::sqrt(simd_sum(squares) / float(32 * N) + as_type<float>(EPS));
  for (int i = 0; i < N; i++) {
    if (norm) v[i] = v[i] * inverse * norm[lane + 32 * i];
    row[lane + 32 * i] = v[i];
  }
  if constexpr (ROT == 0) return;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = 0; 32 * i < ROT; i++) {
    const uint c = lane + 32 * i;
    if (c >= ROT) break;
    const float angle = position * freqs[c < ROT / 2 ? c : c - ROT / 2], other = row[c < ROT / 2 ? c + ROT / 2 : c - ROT / 2];
    const float cosine = precise::cos(angle) * as_type<float>(STRETCH), sine = precise::sin(angle) * as_type<float>(STRETCH);
    v[i] = v[i] * cosine + (c < ROT / 2 ? -other : other) * sine;
  }
}

// Queries as scores of coded pages take them: of our codecs whole numbers, of others floats, turned where keys are.
template <int N, int CODED, int TURNED, int WORTH, int ROOT, class X>
METAL_FUNC void code_query(thread float* v, const device float* signs, device X* x, device float* factors, uint row,
                           uint lane) {
  const float root = as_type<float>(ROOT);
  float factor = as_type<float>(WORTH) * root;
  if (CODED) {
    factor = query_row<N>(v, signs, root, lane) * factor;
  } else if (TURNED) {
    for (int i = 0; i < N; i++) v[i] *= signs[lane + 32 * i];
    walsh_hadamard<N>(v, lane);
    for (int i = 0; i < N; i++) v[i] *= root;
  }
  for (int i = 0; i < N; i++) x[ulong(row) * 32 * N + lane + 32 * i] = X(v[i]);
  if (lane == 0) factors[row] = factor;
}
template <int N, int CODED, int TURNED, int WORTH, int ROOT>
METAL_FUNC void code_query(thread float*, const device float*, Nothing, Nothing, uint, uint) {}

// proj [B, t, (2 H + 2 KV) D]: query and gate of each head, keys, values. Out: q [B, H, t, D], kv [2, B, KV, t, D], and for
// a cache with codes x [B, H, t, D], factors [B, H, t]. dims: t; offsets: positions of the first tokens.
template <int B, int H, int KV, int D, int ROT, int EPS, int STRETCH, int CODED, int TURNED, int WORTH, int ROOT, int SIMDS,
          class T, class P, class O, class M, class Q, class K, class X, class F>
METAL_FUNC void prepared(const device T* proj, const device float* q_norm, const device float* k_norm,
                         P freqs, const device float* signs, O offsets, M dims, device Q* q, device K* kv,
                         X x, F factors, threadgroup float* rows, Place at) {
  constexpr uint N = D / 32, HEADS = H + 2 * KV;
  const uint t = dims[0], unit = at.group.x * SIMDS + at.simd, token = unit / HEADS, head = unit % HEADS;
  if (token >= B * t) return;
  const uint b = token / t, i = token % t, column = head < H ? 2 * head : H + head;
  const device T* from = proj + (ulong(token) * (HEADS + H) + column) * D + at.lane;
  float v[N];
  for (uint c = 0; c < N; c++) v[c] = float(from[32 * c]);
  if (head < H + KV)
    turn_head<N, ROT, EPS, STRETCH>(v, head < H ? q_norm : k_norm, freqs, float(offsets[b] + int(i)), rows + at.simd * D,
                                    at.lane);
  if (head >= H) {
    const uint side = head >= H + KV, g = head - H - side * KV;
    device K* to = kv + (((ulong(side) * B + b) * KV + g) * t + i) * D + at.lane;
    for (uint c = 0; c < N; c++) to[32 * c] = K(v[c]);
    return;
  }
  const uint row = (b * H + head) * t + i;
  for (uint c = 0; c < N; c++) q[ulong(row) * D + at.lane + 32 * c] = Q(v[c]);
  code_query<N, CODED, TURNED, WORTH, ROOT>(v, signs, x, factors, row, at.lane);
}
template <int... SIZES, class T, class P, class O, class M, class Q, class K>
METAL_FUNC void attention(const device T* proj, const device float* q_norm, const device float* k_norm,
                          P freqs, const device float* signs, O offsets, M dims, device Q* q, device K* kv,
                          threadgroup float* rows, Place at) {
  prepared<SIZES...>(proj, q_norm, k_norm, freqs, signs, offsets, dims, q, kv, Nothing{}, Nothing{}, rows, at);
}
template <int... SIZES, class T, class P, class O, class M, class Q, class K, class X>
METAL_FUNC void attention(const device T* proj, const device float* q_norm, const device float* k_norm,
                          P freqs, const device float* signs, O offsets, M dims, device Q* q, device K* kv,
                          device X* x, device float* factors, threadgroup float* rows, Place at) {
  prepared<SIZES...>(proj, q_norm, k_norm, freqs, signs, offsets, dims, q, kv, x, factors, rows, at);
}

}  // namespace hm
