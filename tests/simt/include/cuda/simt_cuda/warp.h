// Barriers and what the lanes of a warp do together.
#pragma once
#include "types.h"

inline void __syncthreads(SIMT_SITE) {
  simt::simt_barrier(simt::MEM_DEVICE | simt::MEM_TG, file, line);
}
inline void __syncwarp(unsigned mask = ~0u, SIMT_SITE) {
  simt::simt_simd_barrier(simt::MEM_DEVICE | simt::MEM_TG, mask, file, line);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {}
inline long long clock64() { return 0; }
inline void __trap() { __builtin_trap(); }

namespace simt_cuda {
constexpr uint64_t OWN_VALUE = ~0ull;  // a shuffle's source that leaves the lane what it has

template <class T> void gather(Lane** lanes, int n, Lane** by_lane, int width) {
  alignas(T) char value[64][sizeof(T)];
  for (int i = 0; i < width; i++)
    if (by_lane[i]) memcpy(value[i], by_lane[i]->val, sizeof(T));
  for (int i = 0; i < n; i++) {
    const uint64_t from = lanes[i]->arg;
    if (from == OWN_VALUE) continue;
    if (from < uint64_t(width) && by_lane[from]) {
      memcpy(lanes[i]->val, value[from], sizeof(T));
    } else {
      memset(lanes[i]->val, 0xFF, sizeof(T));
      simt_fail("shuffle-inactive", "a value is read from a lane that takes no part",
                lanes[i]->file, lanes[i]->line);
    }
  }
}
inline void ballot(Lane** lanes, int n, Lane**, int) {
  uint64_t mask = 0;
  for (int i = 0; i < n; i++)
    if (lanes[i]->arg) mask |= 1ull << lanes[i]->lane;
  for (int i = 0; i < n; i++) operand<uint64_t>(lanes[i]) = mask;
}
template <class Op, class T> void reduce(Lane** lanes, int n, Lane**, int) {
  T all = operand<T>(lanes[0]);
  for (int i = 1; i < n; i++) all = Op::of(all, operand<T>(lanes[i]));
  for (int i = 0; i < n; i++) operand<T>(lanes[i]) = all;
}
template <class T> struct Match { T value; uint64_t mask; };
template <class T> void match(Lane** lanes, int n, Lane**, int) {
  for (int i = 0; i < n; i++) {
    Match<T>& mine = operand<Match<T>>(lanes[i]);
    mine.mask = 0;
    for (int j = 0; j < n; j++)
      if (!memcmp(&mine.value, &operand<Match<T>>(lanes[j]).value, sizeof(T)))
        mine.mask |= 1ull << lanes[j]->lane;
  }
}
template <class T>
T shuffle(unsigned mask, T value, uint64_t source, const char* file, uint32_t line) {
  simt_block_coll(&value, source, mask, gather<T>, file, line);
  return value;
}
struct Add { template <class T> static T of(T a, T b) { return a + b; } };
struct Min { template <class T> static T of(T a, T b) { return b < a ? b : a; } };
struct Max { template <class T> static T of(T a, T b) { return a < b ? b : a; } };
struct And { template <class T> static T of(T a, T b) { return a & b; } };
struct Or { template <class T> static T of(T a, T b) { return a | b; } };
struct Xor { template <class T> static T of(T a, T b) { return a ^ b; } };
}  // namespace simt_cuda

// A lane's sub-warp of `width` begins at first; a source outside it leaves the lane its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_SITE) {
  const uint32_t first = simt_cuda::lane() & ~(width - 1u);
  return simt_cuda::shuffle(mask, value, first + (source & (width - 1u)), file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32, SIMT_SITE) {
  const uint32_t first = simt_cuda::lane() & ~(width - 1u), from = simt_cuda::lane() ^ with;
  const bool later = (from & ~(width - 1u)) > first;
  return simt_cuda::shuffle(mask, value, later ? simt_cuda::OWN_VALUE : from, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, SIMT_SITE) {
  const uint32_t me = simt_cuda::lane(), within = me & (width - 1u);
  return simt_cuda::shuffle(mask, value, within >= by ? me - by : simt_cuda::OWN_VALUE, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, SIMT_SITE) {
  const uint32_t me = simt_cuda::lane(), within = me & (width - 1u);
  const bool inside = within + by < uint32_t(width);
  return simt_cuda::shuffle(mask, value, inside ? me + by : simt_cuda::OWN_VALUE, file, line);
}

inline unsigned __ballot_sync(unsigned mask, int vote, SIMT_SITE) {
  uint64_t result = 0;
  simt::simt_block_coll(&result, vote != 0, mask, simt_cuda::ballot, file, line);
  return unsigned(result);
}
inline int __any_sync(unsigned mask, int vote, SIMT_SITE) {
  return __ballot_sync(mask, vote, file, line) != 0;
}
inline int __all_sync(unsigned mask, int vote, SIMT_SITE) {
  return __ballot_sync(mask, !vote, file, line) == 0;
}
// Which lanes are here now: no lane is required.
inline unsigned __activemask(SIMT_SITE) { return __ballot_sync(0, 1, file, line); }

#define SIMT_REDUCE(name, Op)                                                              \
  template <class T> T name(unsigned mask, T value, SIMT_SITE) {                           \
    simt::simt_block_coll(&value, 0, mask, simt_cuda::reduce<simt_cuda::Op, T>, file, line); \
    return value;                                                                          \
  }
SIMT_REDUCE(__reduce_add_sync, Add)
SIMT_REDUCE(__reduce_min_sync, Min)
SIMT_REDUCE(__reduce_max_sync, Max)
SIMT_REDUCE(__reduce_and_sync, And)
SIMT_REDUCE(__reduce_or_sync, Or)
SIMT_REDUCE(__reduce_xor_sync, Xor)
#undef SIMT_REDUCE

template <class T> unsigned __match_any_sync(unsigned mask, T value, SIMT_SITE) {
  simt_cuda::Match<T> both{value, 0};
  simt::simt_block_coll(&both, 0, mask, simt_cuda::match<T>, file, line);
  return unsigned(both.mask);
}

namespace simt_cuda {
// A vote of the whole block: shared memory of one word between three barriers.
inline int block_vote(int initial, bool keep, const char* file, uint32_t line) {
  static char key;
  int* word = static_cast<int*>(simt_shared(&key, sizeof(int), 16, "block vote"));
  __syncthreads(file, line);
  if (tls.cur->lin == 0) __atomic_store_n(word, initial, __ATOMIC_SEQ_CST);
  __syncthreads(file, line);
  if (!keep) __atomic_store_n(word, !initial, __ATOMIC_SEQ_CST);
  __syncthreads(file, line);
  return __atomic_load_n(word, __ATOMIC_SEQ_CST);
}
}  // namespace simt_cuda
inline int __syncthreads_or(int vote, SIMT_SITE) {
  return simt_cuda::block_vote(0, !vote, file, line);
}
inline int __syncthreads_and(int vote, SIMT_SITE) {
  return simt_cuda::block_vote(1, vote, file, line);
}
