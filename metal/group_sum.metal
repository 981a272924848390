#include "place.metal"

namespace hm {

// Sum over a whole threadgroup; partial has a place for every simdgroup.
template <class V>
METAL_FUNC V group_sum(V v, threadgroup V* partial, uint simds, Place at) {
  v = simd_sum(v);
  if (at.lane == 0) partial[at.simd] = v;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  V total = partial[0];
  for (uint i = 1; i < simds; i++) total += partial[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return total;
}

}  // namespace hm
