// <metal_simdgroup>, <metal_quadgroup>, barriers.
#pragma once
namespace metal {
enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_device_and_threadgroup = 3,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16
};
METAL_FUNC constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return (mem_flags)((uint)a | (uint)b);
}
METAL_FUNC void threadgroup_barrier(mem_flags flags, SIMT_SITE) {
  simt::simt_barrier((uint)flags, simt_f, simt_l);
}
METAL_FUNC void simdgroup_barrier(mem_flags flags, SIMT_SITE) {
  simt::simt_simd_barrier((uint)flags, 0, simt_f, simt_l);
}

// Numbers and vectors of numbers; Metal has no bfloat here.
#define SIMT_ANY \
  template <class T, class = enable_if_t<is_arithmetic_v<elem_t<T>> && !is_same_v<elem_t<T>, bfloat>>>
#define SIMT_ONE(NAME, RESOLVE)                                                    \
  SIMT_ANY inline T NAME(T v, SIMT_SITE) {                                         \
    return collective::wait(v, 0, (ulong)&RESOLVE, simt_f, simt_l);                \
  }

#define SIMT_REDUCE(NAME, OP) SIMT_ONE(NAME, (collective::reduce<collective::OP, T>))
SIMT_REDUCE(simd_sum, Add)
SIMT_REDUCE(simd_product, Multiply)
SIMT_REDUCE(simd_min, Min)
SIMT_REDUCE(simd_max, Max)
SIMT_REDUCE(simd_and, And)
SIMT_REDUCE(simd_or, Or)
SIMT_REDUCE(simd_xor, Xor)
#undef SIMT_REDUCE
#define SIMT_REDUCE(NAME, OP) SIMT_ONE(NAME, (collective::reduce_quad<collective::OP, T>))
SIMT_REDUCE(quad_sum, Add)
SIMT_REDUCE(quad_product, Multiply)
SIMT_REDUCE(quad_min, Min)
SIMT_REDUCE(quad_max, Max)
SIMT_REDUCE(quad_and, And)
SIMT_REDUCE(quad_or, Or)
SIMT_REDUCE(quad_xor, Xor)
#undef SIMT_REDUCE
#define SIMT_SCAN(NAME, OP, INCLUSIVE) \
  SIMT_ONE(NAME, (collective::scan<collective::OP, T, INCLUSIVE>))
SIMT_SCAN(simd_prefix_inclusive_sum, Add, true)
SIMT_SCAN(simd_prefix_exclusive_sum, Add, false)
SIMT_SCAN(simd_prefix_inclusive_product, Multiply, true)
SIMT_SCAN(simd_prefix_exclusive_product, Multiply, false)
#undef SIMT_SCAN
SIMT_ONE(simd_broadcast_first, collective::first<T>)
#undef SIMT_ONE

// FROM: the lane a value comes from, of `mine`, `width` and the argument `a`.
#define SIMT_SHUFFLE(NAME, FROM)                                                              \
  SIMT_ANY inline T NAME(T v, ushort a, SIMT_SITE) {                                          \
    uint mine = simt::me()->lane, width = simt::group()->width;                               \
    (void)mine, (void)width;                                                                  \
    return collective::wait(v, (ulong)(FROM), (ulong)&collective::gather<T>, simt_f, simt_l); \
  }
SIMT_SHUFFLE(simd_shuffle, a)
SIMT_SHUFFLE(simd_broadcast, a)
SIMT_SHUFFLE(simd_shuffle_xor, mine ^ a)
SIMT_SHUFFLE(simd_shuffle_up, mine >= a ? (ulong)(mine - a) : collective::KEEP)
SIMT_SHUFFLE(simd_shuffle_down, mine + a < width ? (ulong)(mine + a) : collective::KEEP)
SIMT_SHUFFLE(simd_shuffle_rotate_up, (mine + width - a % width) % width)
SIMT_SHUFFLE(simd_shuffle_rotate_down, (mine + a) % width)
SIMT_SHUFFLE(quad_shuffle, (mine & ~3u) + a)
SIMT_SHUFFLE(quad_broadcast, (mine & ~3u) + a)
SIMT_SHUFFLE(quad_shuffle_xor, mine ^ a)
SIMT_SHUFFLE(quad_shuffle_up, (mine & 3u) >= a ? (ulong)(mine - a) : collective::KEEP)
SIMT_SHUFFLE(quad_shuffle_down, (mine & 3u) + a < 4 ? (ulong)(mine + a) : collective::KEEP)
#undef SIMT_SHUFFLE

// Lanes past the edge take `fill` as if it lay beyond it.
SIMT_ANY inline T simd_shuffle_and_fill_up(T v, T fill, ushort by, SIMT_SITE) {
  uint mine = simt::me()->lane, width = simt::group()->width;
  ulong from = mine >= by ? mine - by : mine + width - by;
  T inside = collective::wait(v, from, (ulong)&collective::gather<T>, simt_f, simt_l);
  T outside = collective::wait(fill, from, (ulong)&collective::gather<T>, simt_f, simt_l);
  return mine >= by ? inside : outside;
}
SIMT_ANY inline T simd_shuffle_and_fill_down(T v, T fill, ushort by, SIMT_SITE) {
  uint mine = simt::me()->lane, width = simt::group()->width;
  ulong from = (mine + by) % width;
  T inside = collective::wait(v, from, (ulong)&collective::gather<T>, simt_f, simt_l);
  T outside = collective::wait(fill, from, (ulong)&collective::gather<T>, simt_f, simt_l);
  return mine + by < width ? inside : outside;
}

struct simd_vote {
  typedef ulong vote_t;
  ulong votes;
  constexpr simd_vote(ulong v = 0) : votes(v) {}
  explicit constexpr operator vote_t() const { return votes; }
  bool all() const { return votes == 0xffffffff; }
  bool any() const { return votes != 0; }
};
inline simd_vote simd_ballot(bool p, SIMT_SITE) {
  return simd_vote(collective::wait(0ul, p, (ulong)&collective::ballot, simt_f, simt_l));
}
inline simd_vote simd_active_threads_mask(SIMT_SITE) { return simd_ballot(true, simt_f, simt_l); }
inline bool simd_any(bool p, SIMT_SITE) { return simd_ballot(p, simt_f, simt_l).votes != 0; }
inline bool simd_all(bool p, SIMT_SITE) { return simd_ballot(!p, simt_f, simt_l).votes == 0; }
inline bool simd_is_first(SIMT_SITE) {
  ulong votes = simd_ballot(true, simt_f, simt_l).votes;
  return (uint)__builtin_ctzl(votes) == simt::me()->lane;
}
}  // namespace metal
