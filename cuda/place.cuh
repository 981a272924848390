// Where a thread stands, and what threads of a block and a warp do together. Blocks are one-dimensional.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"

#define HM_UNROLL _Pragma("unroll")
#define HM_NO_UNROLL _Pragma("unroll 1")
#define EACH(i, n) HM_UNROLL for (int i = 0; i < (n); i++)

namespace hm {

using uint = unsigned int;
constexpr uint FULL = 0xffffffffu;  // every lane

__device__ inline uint lane_index() { return threadIdx.x % 32; }
__device__ inline uint warp_index() { return threadIdx.x / 32; }

__host__ __device__ constexpr uint min_of(uint a, uint b) { return a < b ? a : b; }
__device__ inline float infinity() { return __uint_as_float(0x7f800000u); }  // INFINITY is no name for NVRTC

// Shared memory of the launch, from its first byte on: 16-byte aligned.
template <class T>
__device__ inline T* shared_memory() {
  extern __shared__ uint4 hm_shared[];
  return reinterpret_cast<T*>(hm_shared);
}

__device__ inline float warp_sum(float v) {
  HM_UNROLL for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(FULL, v, d);
  return v;
}
__device__ inline float warp_max(float v) {
  HM_UNROLL for (int d = 16; d > 0; d /= 2) v = fmaxf(v, __shfl_xor_sync(FULL, v, d));
  return v;
}

// Sum over the block, in the order of its warps; partial: a float for each warp.
__device__ inline float block_sum(float v, float* partial) {
  v = warp_sum(v);
  if (lane_index() == 0) partial[warp_index()] = v;
  __syncthreads();
  float total = partial[0];
  for (uint w = 1; w < blockDim.x / 32; w++) total += partial[w];
  __syncthreads();
  return total;
}

}  // namespace hm
