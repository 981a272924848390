// Second half of a mixture of experts: the weighted sum of a token's experts, the shared one and the residual.
#pragma once
#include "moe_choice.cuh"
#include "moe_rows.cuh"

namespace hm {

// y[t, n] = residual[t, n] + sum_s weight_s down_s[n] . inner[t, s] + sigmoid(shared gate) shared[n] . inner[t, top_k],
// in this order; weight_s: the s-th share (moe_choice.cuh).
//   logits, parts, columns: as in moe_gate_up     inner, shared_inner: numbers of inner[t, s], of inner[t, top_k]
// Logits are older than the launch in front of this one (moe_gate_up, which has waited for them): experts are chosen,
// and their rows are on their way, before that one ends.
// A warp has an expert at a time, and 16 rows; blocks: (16 rows, t)
template <int COUNT>
struct moe_down {
  static constexpr int WARPS = COUNT > 2 ? 8 : 9, THREADS = 32 * WARPS, HEIGHT = 16;
  static __device__ __forceinline__ void run(const float* inner_of, const float* pre, const float* post,
                                             const float* logits, const uint* words, const uint* parts,
                                             const float* residual, float* y, int rows, int inner, int shared_inner,
                                             int columns, int shared_columns, int width, int experts, int top_k,
                                             int part_count, int normalize, int block, int pres, int posts) {
    const uint first = blockIdx.x * HEIGHT, count = min_of(HEIGHT, rows - first), warp = warp_index(), lane = lane_index();
    const size_t t = blockIdx.y;
    const uint warps = blockDim.x / 32, widest = max(columns, shared_columns), blocks = whole_blocks(widest);
    // in shared memory: zeros, terms[s][16], 16 sums a warp, the choice, then for each warp bytes, sums and numbers of a row
    float *terms = shared_at<float>(ZEROS<1>), *scratch = terms + (top_k + 1 + warp) * HEIGHT;
    float* share = terms + (top_k + 1 + warps) * HEIGHT;
    uint* expert = reinterpret_cast<uint*>(share + 64);
    const uint own = ZEROS<1> + 4 * ((top_k + 1 + warps) * HEIGHT + 128) + warp * blocks * 1024;
    const Places at{0, 0, 0, 0, own, own + blocks * 384, own + blocks * 512};
    logits += t * (experts + 1);
    clear_zeros<1>();
    fetch_lines(parts, 0, size_t(experts + 1) * part_count * sizeof(Part),
                threadIdx.x + blockDim.x * (blockIdx.x + gridDim.x * blockIdx.y), blockDim.x * gridDim.x * gridDim.y);
    if (warp == 0) {
      uint e;
      float weight;
      choose(logits, experts, top_k, normalize, e, weight);
      expert[lane] = e, share[lane] = weight;
      __syncwarp();
      if (lane == 0) expert[top_k] = experts, share[top_k] = sigmoid(logits[experts]);
    }
    __syncthreads();
    HM_NO_UNROLL for (uint s = warp; s <= uint(top_k); s += warps) {
      const uint k = s < uint(top_k) ? columns : shared_columns;
      Parts some(parts, expert[s], part_count, first, count);
      while (some.next()) fetch_rows(words, part_at(some.here, 0), k, some.lo, some.hi, lane, 32);
    }
    wait_for_previous();
    HM_NO_UNROLL for (uint s = warp; s <= uint(top_k); s += warps) {
      const bool routed = s < uint(top_k);
      const uint k = routed ? columns : shared_columns;
      const float* x = inner_of + (t * (top_k + 1) + s) * width;
      float* row = shared_at<float>(at.turned);
      Parts some(parts, expert[s], part_count, first, count);
      bool laid = false;
      HM_NO_UNROLL while (some.next()) {
        const uint kind = some.kind, wide = is_rotated(kind) ? k : 0;
        __syncwarp();
        const Rotation turn{pre, post, routed ? inner : shared_inner, int(wide), block, pres, posts};
        if (!laid) lay_row<COUNT>(taken_here(turn), x, k, row);
        laid = true;  // parts of an expert read the same row
        __syncwarp();
        lay_token<1>(at, kind, k, 0, [=](uint i) { return i < k ? row[slot(i)] : 0.0f; }, 0, 1);
        __syncwarp();
        with_kind<1>(words, some.here, kind, WarpRows{words, some.here, k, some.lo, some.hi, at, scratch});
        __syncwarp();
        if (lane < some.hi - some.lo) terms[s * HEIGHT + some.at + lane] = share[s] * scratch[lane];
      }
    }
    __syncthreads();
    const uint i = threadIdx.x;
    if (i >= count) return;
    float sum = 0.0f;
    for (int s = 0; s <= top_k; s++) sum += terms[s * HEIGHT + i];
    const size_t to = t * rows + first + i;
    y[to] = residual ? residual[to] + sum : sum;
  }
};

}  // namespace hm
