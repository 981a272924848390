// Which experts a token goes through, and their shares, by one warp: some hundred cycles, which every block of
// moe_gate_up and moe_down spends anew, because a launch that only chose would cost more.
#pragma once
#include "place.cuh"

namespace hm {

__device__ inline float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

// Logits as integers of the same order, NaN included and never 0: whatever they are, one of them is largest.
__device__ inline uint ordered(float v) {
  const uint u = __float_as_uint(v + 0.0f);  // -0 as 0
  return max(u >> 31 ? ~u : u | 0x80000000u, 1u);
}
__device__ inline float logit_of(uint key) { return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key); }

// A token's experts from the largest logit on, the lower number first among equals. A lane keeps OWN of them sorted,
// so that a step is two reductions of what lanes have in front.
template <int OWN>
struct Ranking {
  unsigned long long front[OWN];  // key, then ~expert; 0: none

  __device__ void open(const float* logits, int experts) {
    EACH(j, OWN) {
      const uint e = 32 * j + lane_index();
      front[j] = 0;
      if (e < uint(experts)) front[j] = (unsigned long long)ordered(logits[e]) << 32 | ~e;
    }
    sort<1, 1>();
  }
  // Batcher's odd-even merge sort, largest first: runs of P are sorted, numbers K apart are compared.
  template <int P, int K>
  __device__ void sort() {
    EACH(i, OWN - K) {
      if (i >= K % P && (i - K % P) / K % 2 == 0 && i / (2 * P) == (i + K) / (2 * P)) exchange(i, i + K);
    }
    if constexpr (K > 1) sort<P, K / 2>();
    else if constexpr (2 * P < OWN) sort<2 * P, 2 * P>();
  }
  __device__ void exchange(int i, int j) {
    const unsigned long long a = front[i], b = front[j];
    front[i] = a > b ? a : b, front[j] = a > b ? b : a;
  }
  __device__ uint largest() const { return __reduce_max_sync(FULL, uint(front[0] >> 32)); }
  // Sum over all experts, relative to the largest.
  __device__ float total(float top) const {
    float sum = 0.0f;
    EACH(j, OWN) sum += front[j] ? expf(logit_of(uint(front[j] >> 32)) - top) : 0.0f;
    return warp_sum(sum);
  }
  // The next expert, given its key, in all lanes.
  __device__ uint next(uint key) {
    const bool here = uint(front[0] >> 32) == key;
    const uint expert = ~__reduce_max_sync(FULL, here ? uint(front[0]) : 0u);
    if (here && uint(front[0]) == ~expert) {
      EACH(j, OWN - 1) front[j] = front[j + 1];
      front[OWN - 1] = 0;
    }
    return expert;
  }
};

// Lane s gets the s-th expert and its share: softmax(logits), over the sum of all shares if normalize.
template <int OWN>
__device__ inline void choose_of(const float* logits, int experts, int top_k, bool normalize, uint& expert,
                                 float& share) {
  Ranking<OWN> ranking;
  ranking.open(logits, experts);
  uint key = ranking.largest(), own = key;
  const float top = logit_of(key), total = ranking.total(top);
  expert = 0;
  for (int s = 0; s < top_k; s++) {
    if (s > 0) key = ranking.largest();
    const uint next = ranking.next(key);
    if (uint(s) == lane_index()) expert = next, own = key;
  }
  share = lane_index() < uint(top_k) ? expf(logit_of(own) - top) : 0.0f;
  share /= total;
  if (normalize) share /= warp_sum(share);
}
// The s-th expert, in all lanes.
template <int OWN>
__device__ inline uint ranked_of(const float* logits, int experts, int s) {
  Ranking<OWN> ranking;
  ranking.open(logits, experts);
  uint expert = 0;
  for (int i = 0; i <= s; i++) expert = ranking.next(ranking.largest());
  return expert;
}

// The same for up to 512 experts: hadamoe.cuda_moe.EXPERTS.
__device__ inline void choose(const float* logits, int experts, int top_k, bool normalize, uint& expert, float& share) {
  if (experts <= 256) choose_of<8>(logits, experts, top_k, normalize, expert, share);
  else choose_of<16>(logits, experts, top_k, normalize, expert, share);
}
__device__ inline uint ranked(const float* logits, int experts, int s) {
  return experts <= 256 ? ranked_of<8>(logits, experts, s) : ranked_of<16>(logits, experts, s);
}

}  // namespace hm
