// Scores of a run of pages to weights of its values, between the two products of attention: in shared memory, a warp each
// query head.
#pragma once
#include "kv_integers.cuh"
#include "kv_numbers.cuh"

namespace hm {

constexpr uint RUN = 4;                   // pages that are softened at once
constexpr uint SCORE_ROW = RUN * PAGE + 4;  // padded, so that lanes meet different banks

// Shared memory of a block: 8 query heads, a run of pages.
template <int D>
struct RunMemory {
  uint4 queries[2 * D];         // of keys that are numbers: kv_numbers.cuh
  signed char bytes[8 * D];     // of keys of ours
  float scores[8 * SCORE_ROW];
  uint4 weights[1088];          // bytes [page][head][high, low][64], or [high, low][8 * WEIGHT_ROW] of bf16
  float token_scales[RUN * PAGE];  // of values: a row's scale or norm
  float factors[8], units[RUN * 8], most[8], total[8], noise[8], by[8], book[32];

  __device__ signed char* digits(uint page, uint head) {
    return reinterpret_cast<signed char*>(weights) + (page * 8 + head) * 2 * PAGE;
  }
  __device__ unsigned short* shares() { return reinterpret_cast<unsigned short*>(weights); }
};
static_assert(2 * 8 * WEIGHT_ROW * 2 <= 1088 * 16 && RUN * 8 * 2 * PAGE <= 1088 * 16, "weights fit");

// A page's weights of tokens 2 lane and 2 lane + 1 as 14 bits of their largest, in two signed bytes each.
template <int D>
__device__ __forceinline__ void store_digits(RunMemory<D>& m, uint page, uint head, uint lane, const float* w, float worth) {
  const float most = warp_max(fmaxf(w[0], w[1])), by = most > 1e-30f ? __fdiv_rn(16383.0f, most) : 0.0f;
  uint high = 0, low = 0;
  EACH(i, 2) {
    const uint n = uint(fminf(__fmul_rn(w[i], by) + 0.5f, 16383.0f));
    high |= (n >> 7) << 8 * i, low |= (n & 127u) << 8 * i;
  }
  unsigned short* to = reinterpret_cast<unsigned short*>(m.digits(page, head)) + lane;
  to[0] = (unsigned short)high, to[PAGE / 2] = (unsigned short)low;
  if (lane == 0) m.units[page * 8 + head] = most > 1e-30f ? __fdiv_rn(most, 16383.0f) * worth : 0.0f;
}

// Softens a head's scores of a run; `first` of a part. ours: weights are whole numbers, worth: what a level is worth of a
// row's scale.
template <int D>
__device__ __forceinline__ void soften(RunMemory<D>& m, uint head, bool first, bool ours, float worth) {
  const uint lane = lane_index();
  float2 s[RUN];
  float most = first ? -infinity() : m.most[head], total = 0.0f, squares = 0.0f;
  const float before = most;
  EACH(p, RUN) {
    s[p] = *reinterpret_cast<const float2*>(m.scores + head * SCORE_ROW + p * PAGE + 2 * lane);
    most = fmaxf(most, fmaxf(s[p].x, s[p].y));
  }
  most = warp_max(most);
  EACH(p, RUN) {
    float w[2] = {expf(s[p].x - most), expf(s[p].y - most)};
    total += w[0] + w[1];
    EACH(i, 2) w[i] *= m.token_scales[p * PAGE + 2 * lane + i];
    squares = fmaf(w[0], w[0], fmaf(w[1], w[1], squares));
    if (ours) {
      store_digits(m, p, head, lane, w, worth);
    } else {
      const Split two(w[0], w[1]);
      uint* to = reinterpret_cast<uint*>(m.shares() + head * WEIGHT_ROW + p * PAGE) + lane;
      to[0] = two.high, to[8 * WEIGHT_ROW / 2] = two.low;
    }
  }
  total = warp_sum(total), squares = warp_sum(squares);
  if (lane == 0) {
    const float by = first ? 0.0f : expf(before - most);
    m.most[head] = most, m.by[head] = by;
    m.total[head] = first ? total : fmaf(m.total[head], by, total);
    m.noise[head] = first ? squares : fmaf(m.noise[head] * by, by, squares);
  }
}

}  // namespace hm
