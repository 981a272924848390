// cooperative_groups: the grid, blocks, and tiles of a warp.
#pragma once
#include "simt_cuda/all.h"

namespace cooperative_groups {
struct grid_group {
  unsigned long long block_rank() const { return simt::tls.g.group_lin; }
  unsigned long long num_blocks() const {
    const simt::U3& n = simt::tls.g.ngroups;
    return 1ull * n.x * n.y * n.z;
  }
  unsigned long long num_threads() const { return num_blocks() * simt::tls.g.nthreads; }
  unsigned long long size() const { return num_threads(); }
  unsigned long long thread_rank() const {
    return block_rank() * simt::tls.g.nthreads + simt::tls.cur->lin;
  }
};
inline grid_group this_grid() { return {}; }

struct thread_block {
  void sync(SIMT_SITE) const { __syncthreads(file, line); }
  unsigned thread_rank() const { return simt::tls.cur->lin; }
  unsigned num_threads() const { return simt::tls.g.nthreads; }
  unsigned size() const { return num_threads(); }
  dim3 thread_index() const { return threadIdx; }
  dim3 group_index() const { return blockIdx; }
};
inline thread_block this_thread_block() { return {}; }

template <unsigned N> struct thread_block_tile {
  static_assert(N && N <= 32 && (N & (N - 1)) == 0, "a tile is a power of two, at most a warp");
  static constexpr unsigned size() { return N; }
  static constexpr unsigned num_threads() { return N; }
  unsigned first() const { return simt_cuda::lane() & ~(N - 1); }
  unsigned mask() const { return N == 32 ? ~0u : ((1u << (N & 31)) - 1) << first(); }
  unsigned thread_rank() const { return simt_cuda::lane() & (N - 1); }
  unsigned meta_group_rank() const { return simt::tls.cur->lin / N; }
  unsigned meta_group_size() const { return (simt::tls.g.nthreads + N - 1) / N; }
  void sync(SIMT_SITE) const { __syncwarp(mask(), file, line); }
  template <class T> T shfl(T v, int from, SIMT_SITE) const {
    return __shfl_sync(mask(), v, from, N, file, line);
  }
  template <class T> T shfl_xor(T v, int with, SIMT_SITE) const {
    return __shfl_xor_sync(mask(), v, with, N, file, line);
  }
  template <class T> T shfl_down(T v, int by, SIMT_SITE) const {
    return __shfl_down_sync(mask(), v, by, N, file, line);
  }
  template <class T> T shfl_up(T v, int by, SIMT_SITE) const {
    return __shfl_up_sync(mask(), v, by, N, file, line);
  }
  unsigned ballot(int vote, SIMT_SITE) const {
    return (__ballot_sync(mask(), vote, file, line) & mask()) >> first();
  }
  bool any(int vote, SIMT_SITE) const { return ballot(vote, file, line) != 0; }
  bool all(int vote, SIMT_SITE) const { return ballot(!vote, file, line) == 0; }
};
template <unsigned N, class Group> thread_block_tile<N> tiled_partition(Group) { return {}; }
}  // namespace cooperative_groups
