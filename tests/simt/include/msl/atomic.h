// <metal_atomic>. Every operation tells the checker; only relaxed order exists, as in Metal.
#pragma once
namespace metal {
enum memory_order {
  memory_order_relaxed = 0,
  memory_order_acquire = 2,
  memory_order_release = 3,
  memory_order_acq_rel = 4,
  memory_order_seq_cst = 5
};
enum thread_scope {
  thread_scope_thread,
  thread_scope_simdgroup,
  thread_scope_threadgroup,
  thread_scope_device
};
template <class T>
struct atomic {
  T v;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<ulong> atomic_ulong;
typedef atomic<bool> atomic_bool;
METAL_FUNC void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device) {}

namespace collective {
template <class T> using bits_of = conditional_t<sizeof(T) == 4, uint, ulong>;

// Replaces the value by f(value) in one step; returns what it was.
template <class T, class F>
METAL_FUNC T update(ulong p, F f) {
  simt::simt_note_atomic(p, sizeof(T), 1, 0);
  thread bits_of<T>* q = (thread bits_of<T>*)p;
  bits_of<T> old = __atomic_load_n(q, 5);
  for (;;) {
    bits_of<T> next = __builtin_bit_cast(bits_of<T>, (T)f(__builtin_bit_cast(T, old)));
    if (__atomic_compare_exchange_n(q, &old, next, false, 5, 5)) return __builtin_bit_cast(T, old);
  }
}
}  // namespace collective

#define SIMT_UPDATE(NAME, SPACE, NEXT)                                          \
  template <class T, class M>                                                   \
  inline T NAME(volatile SPACE atomic<T>* p, M operand, memory_order) {         \
    T x = (T)operand;                                                           \
    return collective::update<T>((ulong)p, [=](T old) { return (T)(NEXT); });   \
  }
#define SIMT_ATOMICS(SPACE)                                                                       \
  SIMT_UPDATE(atomic_fetch_add_explicit, SPACE, old + x)                                          \
  SIMT_UPDATE(atomic_fetch_sub_explicit, SPACE, old - x)                                          \
  SIMT_UPDATE(atomic_fetch_max_explicit, SPACE, old < x ? x : old)                                \
  SIMT_UPDATE(atomic_fetch_min_explicit, SPACE, x < old ? x : old)                                \
  SIMT_UPDATE(atomic_fetch_or_explicit, SPACE, old | x)                                           \
  SIMT_UPDATE(atomic_fetch_and_explicit, SPACE, old & x)                                          \
  SIMT_UPDATE(atomic_fetch_xor_explicit, SPACE, old ^ x)                                          \
  SIMT_UPDATE(atomic_exchange_explicit, SPACE, x)                                                 \
  template <class T>                                                                              \
  inline T atomic_load_explicit(const volatile SPACE atomic<T>* p, memory_order) {                \
    simt::simt_note_atomic((ulong)p, sizeof(T), 0, 0);                                            \
    return __builtin_bit_cast(T, __atomic_load_n((thread collective::bits_of<T>*)(ulong)p, 5));   \
  }                                                                                               \
  template <class T, class M>                                                                     \
  inline void atomic_store_explicit(volatile SPACE atomic<T>* p, M v, memory_order) {             \
    simt::simt_note_atomic((ulong)p, sizeof(T), 1, 0);                                            \
    __atomic_store_n((thread collective::bits_of<T>*)(ulong)p,                                    \
                     __builtin_bit_cast(collective::bits_of<T>, (T)v), 5);                        \
  }                                                                                               \
  template <class T>                                                                              \
  inline bool atomic_compare_exchange_weak_explicit(volatile SPACE atomic<T>* p,                  \
                                                    thread T* expected, T desired, memory_order,  \
                                                    memory_order) {                               \
    using Bits = collective::bits_of<T>;                                                          \
    Bits want = __builtin_bit_cast(Bits, *expected);                                              \
    bool same = false;                                                                            \
    *expected = collective::update<T>((ulong)p, [&](T old) {                                      \
      same = __builtin_bit_cast(Bits, old) == want;                                               \
      return same ? desired : old;                                                                \
    });                                                                                           \
    return same;                                                                                  \
  }
SIMT_ATOMICS(device)
SIMT_ATOMICS(threadgroup)
#undef SIMT_ATOMICS
#undef SIMT_UPDATE
}  // namespace metal
