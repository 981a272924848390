// First half of a mixture of experts: inner = silu(gate) * up of a token's experts and of the shared one.
#pragma once
#include "moe_choice.cuh"
#include "moe_rows.cuh"
#include "qmatvec.cuh"

namespace hm {

// inner[t, s, i] = silu(x[t] . gate[i]) * (x[t] . up[i]) of the s-th expert of token t; s = top_k: the shared one.
//   logits [t, experts + 1]: the router's, then the shared gate's    parts: of experts + 1 experts, the shared one last
//   in: columns of x     columns, shared_columns: of the weights     inner, shared_inner: rows of gate and of up
//   width: numbers from inner to inner     BLOCK, pres, posts: of the rotation, for parts that want it
// Blocks: (48 rows of gate and of up, s, t): 99 for a token of 8 experts of 512, all at once on 132 multiprocessors,
// each with registers to itself.
struct moe_gate_up {
  static constexpr int THREADS = 32 * WARPS, HEIGHT = 48;
  static __device__ __forceinline__ void run(const float* x, const float* gamma, const float* pre, const float* post,
                                             const float* logits, const uint* words, const uint* parts, float* inner_of,
                                             int in, int columns, int shared_columns, int inner, int shared_inner,
                                             int width, int experts, int top_k, int part_count, int block, int pres,
                                             int posts, float eps) {
    const int s = int(blockIdx.y), t = int(blockIdx.z);
    const bool routed = s < top_k;
    const uint first = blockIdx.x * HEIGHT, rows = routed ? inner : shared_inner, k = routed ? columns : shared_columns;
    const Places at = places_for<1>(k);
    const Input input{x, gamma, F32, eps, {pre, post, in, int(k), block, pres, posts}};
    float* terms = shared_at<float>(at.turned) + padded(int(k));  // of gate, of up
    uint* chosen = reinterpret_cast<uint*>(terms + 2 * HEIGHT);
    clear_zeros<1>();
    // the table, of which nobody knows yet what is needed, comes while others still work
    fetch_lines(parts, 0, size_t(experts + 1) * part_count * sizeof(Part),
                threadIdx.x + THREADS * (blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z)),
                THREADS * gridDim.x * gridDim.y * gridDim.z);
    wait_for_previous();
    if (first >= rows) return;
    if (warp_index() == 0) {
      const uint e = routed ? ranked(logits + size_t(t) * (experts + 1), experts, s) : uint(experts);
      if (lane_index() == 0) *chosen = e;
    }
    __syncthreads();
    const uint expert = *chosen, count = min_of(HEIGHT, rows - first);
    HM_NO_UNROLL for (uint side = 0; side < 2; side++) {
      Parts some(parts, expert, part_count, side * rows + first, count);
      while (some.next()) fetch_rows(words, part_at(some.here, 0), k, some.lo, some.hi);
    }
    uint laid = NONE;  // the kind for which x lies in shared memory
    HM_NO_UNROLL for (uint side = 0; side < 2; side++) {
      Parts some(parts, expert, part_count, side * rows + first, count);
      HM_NO_UNROLL while (some.next()) {
        if (some.kind != laid) {
          Input own = input;
          own.r = taken_here(input.r);
          lay_input<1>(own, at, some.kind, k, 0, t);
        }
        laid = some.kind;
        part_rows<1>(words, some.here, some.kind, k, some.lo, some.hi);
        const uint i = threadIdx.x;
        if (i < some.hi - some.lo) terms[side * HEIGHT + some.at + i] = results<1>()[i];
        __syncthreads();
      }
    }
    const uint i = threadIdx.x;
    if (i >= count) return;
    const float inverse = gamma ? *shared_at<float>(at.inverse) : 1.0f, gate = terms[i] * inverse;
    inner_of[(size_t(t) * (top_k + 1) + s) * width + first + i] = gate * sigmoid(gate) * (terms[HEIGHT + i] * inverse);
  }
};

}  // namespace hm
