// Loads with a cache hint, atomics, and asynchronous copies to shared memory.
#pragma once
#include "types.h"

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldca(const T* p) { return *p; }
template <class T> void __stcs(T* p, T v) { *p = v; }
template <class T> void __stcg(T* p, T v) { *p = v; }

namespace simt_cuda {
template <int bytes> struct UintOf;
template <> struct UintOf<2> { using type = uint16_t; };
template <> struct UintOf<4> { using type = uint32_t; };
template <> struct UintOf<8> { using type = uint64_t; };

// *p = change(*p) in one step; the old value.
template <class T, class F> T exchanged(T* p, F change) {
  using U = typename UintOf<sizeof(T)>::type;
  simt_note_atomic(p, sizeof(T), 1, nullptr);
  U* word = reinterpret_cast<U*>(p);
  U old = __atomic_load_n(word, __ATOMIC_SEQ_CST);
  while (!__atomic_compare_exchange_n(word, &old, bits<U>(T(change(bits<T>(old)))), false,
                                      __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return bits<T>(old);
}
}  // namespace simt_cuda
#define SIMT_ATOMIC(name, expression)                        \
  template <class T, class V> T name(T* p, V given) {        \
    const T v = T(given);                                    \
    return simt_cuda::exchanged(p, [=](T old) { return expression; }); \
  }
SIMT_ATOMIC(atomicAdd, T(old + v))
SIMT_ATOMIC(atomicSub, T(old - v))
SIMT_ATOMIC(atomicMax, old < v ? v : old)
SIMT_ATOMIC(atomicMin, v < old ? v : old)
SIMT_ATOMIC(atomicOr, T(old | v))
SIMT_ATOMIC(atomicAnd, T(old & v))
SIMT_ATOMIC(atomicXor, T(old ^ v))
SIMT_ATOMIC(atomicExch, v)
#undef SIMT_ATOMIC
template <class T> T atomicCAS(T* p, T expected, T v) {
  return simt_cuda::exchanged(p, [=](T old) { return old == expected ? v : old; });
}

// A copy happens when it is waited for: a missing wait leaves shared memory unwritten, and the
// checker sees it read. Without the checker it reads 0xFF bytes.
extern "C" {
void simt_copy_async(void* to, const void* from, int bytes, int zeros);
void simt_copy_commit();
void simt_copy_wait(int groups_left, void* pc);
}
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  simt_copy_async(to, from, int(bytes), int(zeros));
}
inline void __pipeline_commit() { simt_copy_commit(); }
__forceinline__ void __pipeline_wait_prior(int groups_left) {
  simt_copy_wait(groups_left, nullptr);  // pc: the caller's, so this must be inlined
}

// Shared addresses are 32 bits wide in PTX: here the lower half of the real address.
inline size_t __cvta_generic_to_shared(const void* p) { return uint32_t(uintptr_t(p)); }
inline size_t __cvta_generic_to_global(const void* p) { return uintptr_t(p); }
