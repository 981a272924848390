// What clang's -fsanitize=thread and -fsanitize=bounds,... call. No sanitizer library is linked: the
// calls are the checker's.
#include <string.h>

#include "engine.h"

#define PC ((uint64_t)__builtin_return_address(0))

namespace simt {

// ---- loads and stores

#define SIMT_ACCESS(N)                                                                          \
  API void __tsan_read##N(void* p) { access((char*)p, N, false, false, PC); }                   \
  API void __tsan_write##N(void* p) { access((char*)p, N, true, false, PC); }                   \
  API void __tsan_unaligned_read##N(void* p) { access((char*)p, N, false, false, PC); }         \
  API void __tsan_unaligned_write##N(void* p) { access((char*)p, N, true, false, PC); }         \
  API void __tsan_read_write##N(void* p) {                                                      \
    access((char*)p, N, false, false, PC);                                                      \
    access((char*)p, N, true, false, PC);                                                       \
  }                                                                                             \
  API void __tsan_unaligned_read_write##N(void* p) {                                            \
    access((char*)p, N, false, false, PC);                                                      \
    access((char*)p, N, true, false, PC);                                                       \
  }
SIMT_ACCESS(1) SIMT_ACCESS(2) SIMT_ACCESS(4) SIMT_ACCESS(8) SIMT_ACCESS(16)
#undef SIMT_ACCESS

API void __tsan_read_range(void* p, long n) { access((char*)p, (size_t)n, false, false, PC); }
API void __tsan_write_range(void* p, long n) { access((char*)p, (size_t)n, true, false, PC); }
API void* __tsan_memcpy(void* to, const void* from, size_t n) {
  access((const char*)from, n, false, false, PC);
  access((char*)to, n, true, false, PC);
  return memcpy(to, from, n);
}
API void* __tsan_memmove(void* to, const void* from, size_t n) {
  access((const char*)from, n, false, false, PC);
  access((char*)to, n, true, false, PC);
  return memmove(to, from, n);
}
API void* __tsan_memset(void* to, int value, size_t n) {
  access((char*)to, n, true, false, PC);
  return memset(to, value, n);
}
// Metal's atomics report themselves; these serve CUDA's.
extern "C" void simt_note_atomic(const void* p, size_t n, int write, void* pc) {
  access((const char*)p, n, write, true, pc ? (uint64_t)pc : PC);
}
// An access by the simulator on the running lane's behalf, for the instruction at pc.
extern "C" void simt_note_range(const void* p, size_t n, int write, void* pc) {
  Lane* lane = tls.cur;
  if (!lane) return;
  uint8_t flags = lane->flags;
  lane->flags &= (uint8_t)~UNCHECKED;
  access((const char*)p, n, write, false, (uint64_t)pc);
  lane->flags = flags;
}

API void __tsan_init() {}
API void __tsan_func_entry(void*) {}
API void __tsan_func_exit() {}
API void __tsan_vptr_update(void**, void*) {}
API void __tsan_vptr_read(void**) {}
API void __tsan_atomic_thread_fence(int) {}
API void __tsan_atomic_signal_fence(int) {}

#define SIMT_RMW(N, T, NAME)                                              \
  API T __tsan_atomic##N##_##NAME(volatile T* p, T value, int) {          \
    return __atomic_##NAME(p, value, __ATOMIC_SEQ_CST);                   \
  }
#define SIMT_ATOMIC(N, T)                                                                        \
  API T __tsan_atomic##N##_load(const volatile T* p, int) {                                      \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                 \
  }                                                                                              \
  API void __tsan_atomic##N##_store(volatile T* p, T value, int) {                               \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                                \
  }                                                                                              \
  API T __tsan_atomic##N##_exchange(volatile T* p, T value, int) {                               \
    return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);                                      \
  }                                                                                              \
  SIMT_RMW(N, T, fetch_add) SIMT_RMW(N, T, fetch_sub) SIMT_RMW(N, T, fetch_or)                   \
  SIMT_RMW(N, T, fetch_and) SIMT_RMW(N, T, fetch_xor)                                            \
  API int __tsan_atomic##N##_compare_exchange_strong(volatile T* p, T* e, T value, int, int) {   \
    return __atomic_compare_exchange_n(p, e, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);  \
  }                                                                                              \
  API int __tsan_atomic##N##_compare_exchange_weak(volatile T* p, T* e, T value, int, int) {     \
    return __atomic_compare_exchange_n(p, e, value, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);   \
  }                                                                                              \
  API T __tsan_atomic##N##_compare_exchange_val(volatile T* p, T e, T value, int, int) {         \
    __atomic_compare_exchange_n(p, &e, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);        \
    return e;                                                                                    \
  }
SIMT_ATOMIC(8, uint8_t) SIMT_ATOMIC(16, uint16_t) SIMT_ATOMIC(32, uint32_t)
SIMT_ATOMIC(64, uint64_t)

// ---- undefined behaviour

struct SourceLocation {  // the first member of every data block clang passes
  const char* file;
  uint32_t line, column;
};

#define SIMT_UNDEFINED(NAME, KIND, TEXT, ...)                                 \
  API void __ubsan_handle_##NAME(SourceLocation* at, ##__VA_ARGS__) {         \
    report(KIND, TEXT, {at->file, at->line, 0});                              \
  }                                                                           \
  API void __ubsan_handle_##NAME##_abort(SourceLocation* at, ##__VA_ARGS__) { \
    report(KIND, TEXT, {at->file, at->line, 0});                              \
  }
SIMT_UNDEFINED(divrem_overflow, "integer-division",
               "division by zero, or of the smallest integer by -1", void*, void*)
SIMT_UNDEFINED(shift_out_of_bounds, "shift", "shifts by less than 0, or by the type's width or more",
               void*, void*)
SIMT_UNDEFINED(float_cast_overflow, "float-to-int", "a number outside the integer type's range",
               void*)
SIMT_UNDEFINED(add_overflow, "overflow", "signed addition overflows", void*, void*)
SIMT_UNDEFINED(sub_overflow, "overflow", "signed subtraction overflows", void*, void*)
SIMT_UNDEFINED(mul_overflow, "overflow", "signed multiplication overflows", void*, void*)
SIMT_UNDEFINED(negate_overflow, "overflow", "signed negation overflows", void*)
SIMT_UNDEFINED(pointer_overflow, "overflow", "pointer arithmetic overflows", void*, void*)
SIMT_UNDEFINED(type_mismatch_v1, "misaligned", "a pointer that no object of its type can have", void*)
SIMT_UNDEFINED(load_invalid_value, "invalid-value", "a bool or enum of no known value", void*)
SIMT_UNDEFINED(builtin_unreachable, "unreachable", "reaches code declared unreachable")
SIMT_UNDEFINED(missing_return, "unreachable", "reaches the end of a function that returns a value")

// The access would destroy other variables of the simulator: the kernel ends here.
API void __ubsan_handle_out_of_bounds(SourceLocation* at, void* index) {
  report("array-bounds", fmt("index %lld of an array", (long long)(intptr_t)index),
         {at->file, at->line, 0});
  give_up();
}
}  // namespace simt
