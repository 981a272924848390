// A kernel's [[attribute]] parameters, convertible to whatever integer type it declares.
#pragma once
namespace simt {
using namespace metal;

struct Position {
  U3 v;
  template <class T, class = enable_if_t<is_integral_v<elem_t<T>>>>
  operator T() const {
    if constexpr (is_vec_v<T>) {
      T r;
      r[0] = (elem_t<T>)v.x;
      r[1] = (elem_t<T>)v.y;
      if constexpr (is_vec<T>::n == 3) r[2] = (elem_t<T>)v.z;
      return r;
    } else {
      return (T)v.x;
    }
  }
};
struct Index {
  uint v;
  template <class T, class = enable_if_t<is_integral_v<T>>>
  operator T() const {
    return (T)v;
  }
};
METAL_FUNC uint volume(U3 v) { return v.x * v.y * v.z; }

METAL_FUNC Position thread_position_in_threadgroup() { return {me()->tid}; }
METAL_FUNC Position threadgroup_position_in_grid() { return {group()->gid}; }
METAL_FUNC Position thread_position_in_grid() {
  U3 t = me()->tid, g = group()->gid, size = group()->gsize_nominal;
  return {{g.x * size.x + t.x, g.y * size.y + t.y, g.z * size.z + t.z}};
}
METAL_FUNC Position threads_per_threadgroup() { return {group()->gsize}; }
METAL_FUNC Position dispatch_threads_per_threadgroup() { return {group()->gsize_nominal}; }
METAL_FUNC Position threadgroups_per_grid() { return {group()->ngroups}; }
METAL_FUNC Position threads_per_grid() { return {group()->grid}; }
METAL_FUNC Position grid_size() { return {group()->grid}; }
METAL_FUNC Position grid_origin() { return {{0, 0, 0}}; }

METAL_FUNC Index thread_index_in_threadgroup() { return {me()->lin}; }
METAL_FUNC Index thread_index_in_simdgroup() { return {me()->lane}; }
METAL_FUNC Index simdgroup_index_in_threadgroup() { return {me()->simd}; }
METAL_FUNC Index simdgroups_per_threadgroup() { return {group()->nsimd}; }
METAL_FUNC Index dispatch_simdgroups_per_threadgroup() {
  return {(volume(group()->gsize_nominal) + group()->width - 1) / group()->width};
}
METAL_FUNC Index threads_per_simdgroup() { return {group()->width}; }
METAL_FUNC Index thread_execution_width() { return {group()->width}; }
METAL_FUNC Index thread_index_in_quadgroup() { return {me()->lane & 3u}; }
METAL_FUNC Index quadgroup_index_in_threadgroup() { return {me()->lin / 4}; }
METAL_FUNC Index quadgroups_per_threadgroup() { return {(group()->nthreads + 3) / 4}; }
METAL_FUNC Index dispatch_quadgroups_per_threadgroup() {
  return {(volume(group()->gsize_nominal) + 3) / 4};
}
}  // namespace simt
