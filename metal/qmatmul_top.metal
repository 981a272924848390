// The largest numbers of a row, largest first, equal ones by place, NaN as the least: a group for a piece of the row,
// then the same for what pieces gave.
#include "place.metal"

namespace hm {

// values, index [row, piece, TOP] of x [row, N]; from: places of x's numbers, or null: their own. Pieces are PIECE long;
// where one has less than TOP numbers, -inf and NOWHERE follow. Groups: (pieces, rows). best_value, best_index: 2 a simdgroup.
template <int N, int PIECE, int TOP, int THREADS>
METAL_FUNC void largest(const device float* x, const device int* from, device float* values, device int* index,
                        threadgroup float* best_value, threadgroup uint* best_index, Place at) {
  constexpr uint each = PIECE / THREADS, simds = THREADS / 32, NOWHERE = 0x7fffffffu;
  const ulong row = ulong(at.group.y) * N;
  const uint begin = at.group.x * PIECE, pieces = (N + PIECE - 1) / PIECE;
  float v[each];
  uint place[each];
  for (uint j = 0; j < each; j++) {
    const uint i = begin + j * THREADS + at.index;
    v[j] = i < N ? x[row + i] : -INFINITY;
    place[j] = i >= N ? NOWHERE : from ? uint(from[row + i]) : i;
    if (!(v[j] > -INFINITY)) v[j] = -INFINITY;
  }
  for (uint k = 0; k < TOP; k++) {
    float most = v[0];
    uint where = place[0];
    for (uint j = 1; j < each; j++) {
      const bool better = v[j] > most || (v[j] == most && place[j] < where);
      most = better ? v[j] : most, where = better ? place[j] : where;
    }
    const float simd_most = simd_max(most);
    where = simd_min(most == simd_most ? where : NOWHERE);
    const uint half_of = k % 2 * simds;  // the other half may still be read
    if (at.lane == 0) best_value[half_of + at.simd] = simd_most, best_index[half_of + at.simd] = where;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    most = best_value[half_of], where = best_index[half_of];
    for (uint s = half_of + 1; s < half_of + simds; s++) {
      const bool better = best_value[s] > most || (best_value[s] == most && best_index[s] < where);
      most = better ? best_value[s] : most, where = better ? best_index[s] : where;
    }
    for (uint j = 0; j < each; j++) {
      if (place[j] == where) v[j] = -INFINITY, place[j] = NOWHERE;
    }
    const ulong to = (ulong(at.group.y) * pieces + at.group.x) * TOP + k;
    if (at.index == 0) values[to] = most, index[to] = int(where);
  }
}

}  // namespace hm
