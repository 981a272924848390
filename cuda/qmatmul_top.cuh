// The largest numbers of a row, largest first, equal ones by place, NaN as the least: a block for a piece of the row,
// then the same for what pieces gave.
#pragma once
#include "place.cuh"

namespace hm {

// values, index [row, piece, top] of x [row, columns]; from: places of x's numbers, or null: their own. Where a piece has
// less than `top` numbers, -inf and NOWHERE follow. Blocks: (pieces, rows).
struct largest {
  static constexpr int THREADS = 256, PIECE = 4096;
  static __device__ void run(const float* x, const int* from, float* values, int* index, int columns, int top) {
    constexpr int COUNT = PIECE / THREADS, WARPS_OF = THREADS / 32;
    constexpr uint NOWHERE = 0x7fffffffu;
    const float NOTHING = -infinity();
    __shared__ float best_value[2 * WARPS_OF];
    __shared__ uint best_place[2 * WARPS_OF];
    const size_t row = size_t(blockIdx.y) * columns;
    wait_for_previous();
    float v[COUNT];
    uint place[COUNT];
    EACH(j, COUNT) {
      const uint i = blockIdx.x * PIECE + j * THREADS + threadIdx.x;
      const bool there = i < uint(columns);
      v[j] = there ? x[row + i] : NOTHING;
      place[j] = !there ? NOWHERE : from ? uint(from[row + i]) : i;
      if (!(v[j] > NOTHING)) v[j] = NOTHING;
    }
    for (int k = 0; k < top; k++) {
      float most = v[0];
      uint where = place[0];
      auto meet = [&](float value, uint at) {
        const bool better = value > most || (value == most && at < where);
        most = better ? value : most, where = better ? at : where;
      };
      HM_UNROLL for (int j = 1; j < COUNT; j++) meet(v[j], place[j]);
      HM_UNROLL for (int d = 16; d > 0; d /= 2) {
        const float value = __shfl_xor_sync(FULL, most, d);
        meet(value, __shfl_xor_sync(FULL, where, d));
      }
      const uint half = k % 2 * WARPS_OF;  // the other half may still be read
      if (lane_index() == 0) best_value[half + warp_index()] = most, best_place[half + warp_index()] = where;
      __syncthreads();
      most = best_value[half], where = best_place[half];
      for (int w = 1; w < WARPS_OF; w++) meet(best_value[half + w], best_place[half + w]);
      EACH(j, COUNT) {
        if (place[j] == where) v[j] = NOTHING, place[j] = NOWHERE;
      }
      const size_t to = (size_t(blockIdx.y) * gridDim.x + blockIdx.x) * top + k;
      if (threadIdx.x == 0) values[to] = most, index[to] = int(where);
    }
  }
};

}  // namespace hm
