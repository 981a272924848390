// y = x W^T for a few tokens: every code is read once, a simdgroup has a few rows at a time.
// x may go through RMSNorm and a rotation on the way in, a residual may be added on the way out.
#include "weight.metal"
#include "rotate.metal"

namespace hm {

// Numbers of one token as a part wants them: rotated in threadgroup memory, or in place, normed on the fly.
template <class T>
struct Token {
  const device T* x;
  const device float* gamma;
  float inverse;
  const threadgroup float* turned;

  METAL_FUNC void unit(uint u, uint k, bool rotated, thread float4* to) const {
    for (int i = 0; i < 8; i++) {
      const uint at = 32 * u + 4 * i;
      for (int j = 0; j < 4; j++) {
        float v = 0.0f;
        if (at + j < k) {
          if (rotated) v = turned[at + j];
          else v = gamma ? float(x[at + j]) * inverse * gamma[at + j] : float(x[at + j]);
        }
        to[i][j] = v;
      }
    }
  }
};

METAL_FUNC float dot_unit(thread const float* w, thread const float4* x) {
  float4 sum = 0.0f;
  for (int i = 0; i < 8; i++) sum = fma(float4(w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]), x[i], sum);
  return (sum.x + sum.y) + (sum.z + sum.w);
}
METAL_FUNC float sum_unit(thread const float4* x) {
  float4 sum = 0.0f;
  for (int i = 0; i < 8; i++) sum += x[i];
  return (sum.x + sum.y) + (sum.z + sum.w);
}

// ROWS rows of a part from `row` on, LANES lanes to a row: sums[r] complete in every lane of row r's lanes.
template <int TABLE, int BITS, int SCALE, int K, int LANES, int ROWS, class T>
METAL_FUNC void part_rows(const device uint* words, Part part, uint row, Token<T> token, thread float* sums, uint lane) {
  constexpr uint units = (K + 31) / 32;
  constexpr uint each = BITS == 2 ? 2 : 1;  // units a lane takes at once: 16 bytes or more
  const bool rotated = part.kind & ROTATED;
  const uint groups = TABLE == plain ? 1 : (K + part.group - 1) / part.group;
  Codes<TABLE, BITS, SCALE> codes;
  codes.open(words, part);
  for (int r = 0; r < ROWS; r++) sums[r] = 0.0f;
  for (uint first = each * (lane % LANES); first < units; first += each * LANES) {
    for (uint u = first; u < min(first + each, units); u++) {
      float4 x[8];
      token.unit(u, K, rotated, x);
      const float sum = TABLE == linear ? sum_unit(x) : 0.0f;
      for (int r = 0; r < ROWS; r++) {
        const ulong n = min(row + r * (32 / LANES), part.rows - 1);
        float w[32];
        codes.unit(piece(words, part.codes) + n * part.stride, u, w);
        if (TABLE == plain && K % 32 != 0) {  // what lies behind a row may be no number
          for (int i = 0; i < 32; i++) w[i] = 32 * u + i < K ? w[i] : 0.0f;
        }
        sums[r] += codes.scaled(words, part, n, groups, u, dot_unit(w, x), sum);
      }
    }
  }
  for (int r = 0; r < ROWS; r++) {
    for (int d = LANES / 2; d > 0; d /= 2) sums[r] += simd_shuffle_xor(sums[r], ushort(d));
  }
}

// The same for whichever of the kinds the part is of.
template <int K, int LANES, int ROWS, int KIND0, int... KINDS, class T>
METAL_FUNC void kind_rows(const device uint* words, Part part, uint row, Token<T> token, thread float* sums, uint lane) {
  if (sizeof...(KINDS) == 0 || (part.kind & KIND) == KIND0)
    part_rows<(KIND0 >> 16), (KIND0 >> 8 & 255), (KIND0 & 255), K, LANES, ROWS>(words, part, row, token, sums, lane);
  else if constexpr (sizeof...(KINDS) > 0)
    kind_rows<K, LANES, ROWS, KINDS...>(words, part, row, token, sums, lane);
}

// y[t, a, n] = residual[t, a, n] + rotate(norm(x[t])) . W[expert[t, a]][n]
//   IN: columns of x       K: of the weight    N: rows of an expert      PARTS: of an expert
//   SLOTS: experts of a token, their numbers in `expert` (null: 0)       LANES of a row, ROWS a lane has at once
//   BLOCK: of the rotation, -1 none      EPS: bits of the norm's      KINDS: of the parts
// A threadgroup has THREADS / 32 simdgroups; groups: (blocks of rows, t * a).
template <int IN, int K, int N, int PARTS, int SLOTS, int LANES, int ROWS, int THREADS, int BLOCK, int PRES, int POSTS,
          int EPS, int... KINDS, class T, class E, class Y>
METAL_FUNC void qmatvec(const device T* x, const device float* gamma, const device float* pre, const device float* post,
                        const device uint* words, const device uint* parts, E expert, const device Y* residual,
                        device Y* y, threadgroup float* turned, threadgroup float* partial, Place at) {
  constexpr uint height = ROWS * (32 / LANES);  // rows of a simdgroup's block
  const uint product = at.group.y;
  Token<T> token{x + ulong(product / SLOTS) * IN, gamma, 1.0f, turned};
  if (gamma) token.inverse = inverse_rms<IN, THREADS>(token.x, as_type<float>(EPS), partial, at);
  if constexpr (BLOCK >= 0)
    rotate<IN, K, BLOCK, THREADS>(token.x, token.inverse, gamma, pre, PRES, post, POSTS, turned, at);

  uint block = at.group.x * (THREADS / 32) + at.simd, begin = 0, p = 0;
  const device uint* table = parts + (expert ? ulong(expert[product]) * PARTS * 8 : 0);
  for (; p < PARTS; p++) {
    const uint rows = table[8 * p], blocks = (rows + height - 1) / height;
    if (block < blocks) break;
    block -= blocks, begin += rows;
  }
  if (p == PARTS) return;
  const Part part = part_at(table, p);
  const uint row = block * height + at.lane / LANES;
  float sums[ROWS];
  kind_rows<K, LANES, ROWS, KINDS...>(words, part, row, token, sums, at.lane);
  for (uint r = 0; r < ROWS; r++) {
    const uint n = row + r * (32 / LANES);
    const ulong to = ulong(product) * N + begin + n;
    if (at.lane % LANES == 0 && n < part.rows) y[to] = Y((residual ? float(residual[to]) : 0.0f) + sums[r]);
  }
}

}  // namespace hm
