// Rows of a weight times a few tokens, by one simdgroup: what every product of decoding is made of.
#include "weight.metal"

namespace hm {

template <int LANES>
METAL_FUNC float lanes_sum(float v) {
  if constexpr (LANES == 32) return simd_sum(v);
  UNROLL for (int d = LANES / 2; d > 0; d /= 2) v += simd_shuffle_xor(v, ushort(d));
  return v;
}

// Lanes that share a row of K columns: as many as it has pieces, 32 at most.
constexpr int lanes_of(int k, int columns) {
  int lanes = 1;
  while (lanes < 32 && lanes * columns < k) lanes *= 2;
  return lanes;
}
// Neighbouring lanes that read one group.
constexpr int sharing(int group, int columns, int lanes) {
  const int n = group / columns;
  return n > 1 && n <= lanes && (n & (n - 1)) == 0 ? n : 1;
}

// sums[r * TOKENS + t] = W[row + r * 32 / LANES] . x[t], complete in all of the row's LANES lanes. `row` is this
// lane's first row. The codes are read once for all tokens; x.eight<ROTATED, WHOLE>(t, i, v) gives the columns
// i .. i + 7 of token t, zeros from K on unless WHOLE, and is asked once for ROWS rows.
template <int KIND, int K, int ROWS, int TOKENS, class X>
METAL_FUNC void rows(const device uint* words, Part part, uint row, thread X& x, thread float* sums, uint lane) {
  using Is = Kind<KIND>;
  constexpr int columns = Is::columns, span = columns < 32 ? columns : 32, group = Is::group;
  constexpr int lanes = lanes_of(K, columns), pieces = (K + columns - 1) / columns;
  constexpr int shared = sharing(group, columns, lanes);
  constexpr bool whole = K % (columns * lanes) == 0;
  Codes<Is::table, Is::bits, Is::scale> codes;
  codes.open(words, part, lane);
  ulong n[ROWS];
  Factor<Is::table, Is::bits, Is::scale> factor[ROWS];
  float total[TOKENS];  // of x, where a row has one bias
  EACH(r, ROWS) {
    n[r] = min(row + r * (32 / lanes), part.rows - 1);
    factor[r].scale = factor[r].bias = 0;
  }
  EACH(t, TOKENS) total[t] = 0.0f;
  EACH(i, ROWS * TOKENS) sums[i] = 0.0f;

  for (uint first = 0; first < pieces; first += lanes) {
    const uint p = first + lane % lanes;
    const bool inside = whole || p < pieces;
    uint w[ROWS][Is::words];
    EACH(r, ROWS) {
      if (inside) load_words<Is::words>(piece(words, part.codes) + n[r] * part.stride + p * Is::words, w[r]);
      else EACH(i, Is::words) w[r][i] = 0;
    }
    UNROLL for (int s = 0; s < columns; s += span) {
      if constexpr (group != 0) {
        const uint g = (p * columns + s) / group;
        EACH(r, ROWS && s % group == 0) {
          if ((whole || p * columns + s < K) && lane % shared == 0) factor[r].load(words, part, n[r] * ((K + group - 1) / group) + g);
          if (shared > 1) factor[r].share(lane & ~uint(shared - 1));
        }
      }
      float dot[ROWS * TOKENS], sum[TOKENS];
      EACH(t, TOKENS) sum[t] = 0.0f;
      EACH(i, ROWS * TOKENS) dot[i] = 0.0f;
      UNROLL for (int c = s; c < s + span; c += 8) {
        float v[ROWS][8];
        EACH(r, ROWS) codes.eight(w[r], c / 8, v[r]);
        EACH(t, TOKENS) {
          float y[8];
          x.template eight<Is::rotated, whole>(t, p * columns + c, y);
          EACH(i, 8) {
            if (Is::table == linear) sum[t] += y[i];
          }
          EACH(r, ROWS) {  // chains of 8: rounding errors grow with their length
            float eight = v[r][0] * y[0];
            UNROLL for (int i = 1; i < 8; i++) eight = fma(v[r][i], y[i], eight);
            dot[r * TOKENS + t] += eight;
          }
        }
      }
      EACH(i, ROWS * TOKENS)
        sums[i] += group ? factor[i / TOKENS].times(dot[i], sum[i % TOKENS]) : dot[i];
      EACH(t, TOKENS) total[t] += sum[t];
    }
  }

  EACH(i, ROWS * TOKENS) sums[i] = lanes_sum<lanes>(sums[i]);
  if constexpr (group == 0 && Is::table != plain) {
    EACH(t, TOKENS && Is::table == linear) total[t] = lanes_sum<lanes>(total[t]);
    EACH(r, ROWS) {
      if (lane % lanes == 0) factor[r].load(words, part, n[r]);
      factor[r].share(lane & ~uint(lanes - 1));
      EACH(t, TOKENS)
        sums[r * TOKENS + t] = factor[r].times(sums[r * TOKENS + t], total[t]);
    }
  }
}

}  // namespace hm
