// What a prompt's mixture of experts needs around its products: who goes where, SwiGLU, and the weighted sum.
#pragma once
#include "moe_choice.cuh"
#include "number.cuh"

namespace hm {

// p[i..i + 8) of a row as in load_eight.
__device__ inline void store_eight(float* p, size_t row, int i, int columns, const float* v) {
  if (columns % 8) {
    EACH(j, 8) if (i + j < columns) p[row + i + j] = v[j];
  } else {
    EACH(q, 2) reinterpret_cast<float4*>(p + row + i)[q] = make_float4(v[4 * q], v[4 * q + 1], v[4 * q + 2], v[4 * q + 3]);
  }
}

// expert[t, top_k] and share[t, top_k + 1], the last the shared expert's, of logits [t, experts + 1]: the router's,
// then the shared gate's. A warp has a token; blocks: (tokens / 4)
struct moe_route {
  static constexpr int THREADS = 128;
  static __device__ void run(const float* logits, int* expert, float* share, int tokens, int experts, int top_k,
                             int normalize) {
    const size_t t = blockIdx.x * (THREADS / 32) + warp_index();
    wait_for_previous();
    if (t >= size_t(tokens)) return;
    logits += t * (experts + 1);
    uint own;
    float weight;
    choose(logits, experts, top_k, normalize, own, weight);
    if (lane_index() < uint(top_k)) {
      expert[t * top_k + lane_index()] = own;
      share[t * (top_k + 1) + lane_index()] = weight;
    }
    if (lane_index() == 0) share[t * (top_k + 1) + top_k] = sigmoid(logits[experts]);
  }
};

// order: places of the pairs by expert, those of one expert as they came; sorted: their experts. An expert that is not
// there counts as the last. Every block has an expert and counts the pairs in front of its own; blocks: (experts)
struct moe_order {
  static constexpr int THREADS = 256;
  static __device__ uint at(const int* expert, int i) { return min_of(uint(expert[i]), gridDim.x - 1); }

  static __device__ void run(const int* expert, int* order, int* sorted, int pairs) {
    constexpr int WARPS = THREADS / 32;
    uint* counts = shared_memory<uint>();  // of lower experts, then of this one, warp by warp
    const uint e = blockIdx.x, lane = lane_index(), warp = warp_index();
    wait_for_previous();
    const int piece = (pairs + THREADS - 1) / THREADS * 32, begin = int(warp) * piece;
    const int end = min(begin + piece, pairs);
    uint lower = 0, own = 0;
    for (int i = begin + int(lane); i < end; i += 32) lower += at(expert, i) < e, own += at(expert, i) == e;
    lower = __reduce_add_sync(FULL, lower), own = __reduce_add_sync(FULL, own);
    if (lane == 0) counts[warp] = lower, counts[WARPS + warp] = own;
    __syncthreads();
    uint to = 0;
    EACH(w, WARPS) to += counts[w] + (uint(w) < warp ? counts[WARPS + w] : 0u);
    for (int first = begin; first < end; first += 32) {
      const int i = first + int(lane);
      const bool mine = i < end && at(expert, i) == e;
      const uint here = __ballot_sync(FULL, mine);
      if (mine) {
        const uint place = to + __popc(here & ((1u << lane) - 1));
        order[place] = i, sorted[place] = int(e);
      }
      to += __popc(here);
    }
  }
};

// y[r, n] = silu(x[r, n]) * x[r, width + n]. Blocks: (rows, pieces)
struct moe_swiglu {
  static constexpr int THREADS = 128;
  static __device__ void run(const float* x, float* y, int width) {
    const size_t row = blockIdx.x;
    wait_for_previous();
    for (int i = 8 * int(blockIdx.y * THREADS + threadIdx.x); i < width; i += 8 * int(gridDim.y) * THREADS) {
      float gate[8], up[8];
      load_eight(x, row * 2 * width, i, width, F32, gate);
      load_eight(x, row * 2 * width + width, i, width, F32, up);
      EACH(j, 8) gate[j] *= sigmoid(gate[j]) * up[j];
      store_eight(y, row * width, i, width, gate);
    }
  }
};

// y[t, n] = residual[t, n] + sum_s share[t, s] routed[t, s, n] + share[t, top_k] own[t, n]. Blocks: (tokens, pieces)
struct moe_join {
  static constexpr int THREADS = 128;
  static __device__ void run(const float* routed, const float* own, const float* share, const float* residual, float* y,
                             int width, int top_k) {
    const size_t t = blockIdx.x;
    wait_for_previous();
    share += t * (top_k + 1);
    for (int i = 8 * int(blockIdx.y * THREADS + threadIdx.x); i < width; i += 8 * int(gridDim.y) * THREADS) {
      float sum[8], v[8];
      EACH(j, 8) sum[j] = 0.0f;
      for (int s = 0; s < top_k; s++) {
        load_eight(routed, (t * top_k + s) * width, i, width, F32, v);
        EACH(j, 8) sum[j] = fmaf(share[s], v[j], sum[j]);
      }
      load_eight(own, t * width, i, width, F32, v);
      EACH(j, 8) sum[j] = fmaf(share[top_k], v[j], sum[j]);
      if (residual) {
        load_eight(residual, t * width, i, width, F32, v);
        EACH(j, 8) sum[j] += v[j];
      }
      store_eight(y, t * width, i, width, sum);
    }
  }
};

}  // namespace hm
