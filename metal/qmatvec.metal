// y = x W^T for a few tokens: every code is read once, a simdgroup has a few rows at a time.
// x may go through RMSNorm on the way in, a residual may be added on the way out.
#include "rows.metal"

namespace hm {

// What rows are multiplied with: x, times the norm's weights where there are any.
template <int IN, int K, int TOKENS, int COUNT, class T>
struct Tokens {
  const device T* x;
  const device float* gamma;
  uint first;            // token
  float square[TOKENS];  // the sum of the numbers of x this lane has been asked for, squared

  template <bool ROTATED, bool WHOLE>
  METAL_FUNC void eight(int t, uint i, thread float* v) {
    EACH(j, 8) v[j] = 0.0f;
    if (!WHOLE && i >= uint(ROTATED ? K : IN)) return;
    load_eight<IN>(x + ulong(COUNT ? min(first + t, uint(COUNT - 1)) : first + t) * IN, i, v);
    if (!gamma) return;
    float g[8];
    load_eight<IN>(gamma, i, g);
    EACH(j, 8) square[t] = fma(v[j], v[j], square[t]), v[j] *= g[j];
  }
  // The sum of x squared, where a row's LANES have been asked for all of it.
  template <bool ROTATED, int LANES>
  METAL_FUNC float whole_square(int t) { return lanes_sum<LANES>(square[t]); }
};

// A part's rows `row` .. `row` + HEIGHT - 1, by one simdgroup.
template <int IN, int K, int STRIDE, int ROWS, int TOKENS, int COUNT, int HEIGHT, int EPS, class X, class Y>
struct PartRows {
  const device uint* words;
  Part part;
  X tokens;
  const device Y* residual;
  device Y* y;  // of the part's first row; STRIDE from token to token
  uint row, lane;

  template <int KIND>
  METAL_FUNC void run() {
    constexpr bool rotated = Kind<KIND>::rotated;
    constexpr int k = rotated ? K : IN, lanes = lanes_of(k, Kind<KIND>::columns), step = 32 / lanes;
    for (uint r = row + lane / lanes; r < row + HEIGHT; r += ROWS * step) {
      float sums[ROWS * TOKENS];
      X x = tokens;
      EACH(t, TOKENS) x.square[t] = 0.0f;
      rows<KIND, k, ROWS, TOKENS>(words, part, r, x, sums, lane);
      EACH(t, TOKENS) {
        float inverse = 1.0f;
        if (x.gamma) {
          const float square = x.template whole_square<rotated, lanes>(t);
          inverse = 1.0f / precise::sqrt(square / float(IN) + as_type<float>(EPS));
        }
        EACH(i, ROWS) {
          const uint n = r + i * step, token = x.first + t;
          const ulong to = ulong(token) * STRIDE + n;
          if (lane % lanes == 0 && n < part.rows && (!COUNT || token < uint(COUNT)))
            y[to] = Y((residual ? float(residual[to]) : 0.0f) + inverse * sums[i * TOKENS + t]);
        }
      }
    }
  }
};

// y[t, a, n] = residual[t, a, n] + rotate(norm(x[t])) . W[expert[t, a]][n]
//   IN: columns of x      K: of a rotated row   N: rows of an expert   PARTS: of an expert
//   SLOTS: experts of a token, their numbers in `expert` (null: 0)     TOKENS: of a threadgroup   COUNT: of all, 0: a multiple
//   ROWS: of a lane at once   HEIGHT: of a simdgroup, PASSES times   EPS: bits of the norm's   KINDS: of the parts
// Groups: (blocks of rows, t / TOKENS * a). tokens.first is not set yet.
template <int IN, int K, int N, int PARTS, int SLOTS, int COUNT, int TOKENS, int ROWS, int HEIGHT, int PASSES,
          int THREADS, int EPS, int... KINDS, class X, class E, class Y>
METAL_FUNC void products(X tokens, const device uint* words, const device uint* parts, E expert,
                         const device Y* residual, device Y* y, Place at) {
  const uint slot = at.group.y % SLOTS;
  tokens.first = at.group.y / SLOTS * TOKENS;
  const device uint* table = parts + (expert ? ulong(expert[tokens.first * SLOTS + slot]) * PARTS * 8 : 0);
  for (uint pass = 0; pass < PASSES; pass++) {
    uint block = (at.group.x * (THREADS / 32) + at.simd) * PASSES + pass, begin = slot * N, p = 0;
    for (; p < PARTS; p++) {
      const uint count = table[8 * p], blocks = (count + HEIGHT - 1) / HEIGHT;
      if (block < blocks) break;
      block -= blocks, begin += count;
    }
    if (p == PARTS) return;
    PartRows<IN, K, SLOTS * N, ROWS, TOKENS, COUNT, HEIGHT, EPS, X, Y> product{
        words, part_at(table, p), tokens, residual ? residual + begin : nullptr, y + begin, block * HEIGHT, at.lane};
    with_kind<KINDS...>(product.part.kind, product);
  }
}

// Parts that want x rotated have it so.
template <int IN, int K, int N, int PARTS, int SLOTS, int COUNT, int TOKENS, int ROWS, int HEIGHT, int PASSES,
          int THREADS, int EPS, int... KINDS, class T, class E, class Y>
METAL_FUNC void qmatvec(const device T* x, const device float* gamma, const device uint* words, const device uint* parts,
                        E expert, const device Y* residual, device Y* y, Place at) {
  const Tokens<IN, K, TOKENS, COUNT, T> tokens{x, gamma};
  products<IN, K, N, PARTS, SLOTS, COUNT, TOKENS, ROWS, HEIGHT, PASSES, THREADS, EPS, KINDS...>(
      tokens, words, parts, expert, residual, y, at);
}

}  // namespace hm
