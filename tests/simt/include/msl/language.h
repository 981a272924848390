// Keywords and types of Metal, and what the engine offers (include/simt/abi.h in this language).
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable

#define device __global
#define threadgroup __local
#define thread __private
#define constant const __constant
#define METAL_FUNC inline __attribute__((__always_inline__))

// Words of OpenCL that are names in Metal.
#define global simt_name_global
#define local simt_name_local
#define generic simt_name_generic
#define pipe simt_name_pipe
#define read_only simt_name_read_only
#define write_only simt_name_write_only
#define read_write simt_name_read_write
#define atomic_int simt_name_atomic_int
#define atomic_uint simt_name_atomic_uint
#define atomic_long simt_name_atomic_long
#define atomic_ulong simt_name_atomic_ulong
#define atomic_float simt_name_atomic_float

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;
typedef ulong uintptr_t;
typedef long intptr_t;
typedef __bf16 bfloat;

namespace simt {
struct U3 {
  uint x, y, z;
};
struct Lane;
typedef void (*ResolveFn)(Lane* thread* lanes, int n, Lane* thread* by_lane, int width);
struct Lane {
  void* sp;
  uchar st, flags;
  ushort lane;
  uint simd, lin;
  U3 tid;
  void thread* val;
  ulong arg, need;
  ResolveFn rf;
  ulong file;
  uint line;
};
struct GroupInfo {
  U3 gid, ngroups, gsize, gsize_nominal, grid;
  uint width, nthreads, nsimd, group_lin;
  uchar cuda, order;
};
extern "C" {
void simt_block_coll(void thread* val, ulong arg, ulong need, ulong rf, ulong file, uint line);
void simt_barrier(uint flags, ulong file, uint line);
void simt_simd_barrier(uint flags, ulong need, ulong file, uint line);
ulong simt_shared(ulong key, ulong size, ulong align, ulong name);
ulong simt_dyn_shared(uint index);
void simt_note_atomic(ulong p, ulong n, int wr, ulong pc);
ulong simt_cur();
ulong simt_group();
float simt_m1(int f, float x);
float simt_m2(int f, float x, float y);
void simt_fail(ulong kind, ulong msg, ulong file, uint line);
}

METAL_FUNC Lane* me() { return (Lane*)(void thread*)simt_cur(); }
METAL_FUNC const GroupInfo thread* group() { return (const GroupInfo thread*)simt_group(); }

// The caller's source line, as trailing parameters of every operation that waits for other lanes.
#define SIMT_SITE ulong simt_f = (ulong)__builtin_FILE(), uint simt_l = __builtin_LINE()

// A threadgroup variable: the key's address tells instances of one template apart.
template <class T, int ID>
struct SharedKey {
  static constexpr __constant char key = 0;
};
template <class T, int ID>
METAL_FUNC __local T& shared(const __constant char* name, bool zero) {
  ulong align = (alignof(T) < 16 ? 16 : alignof(T)) | (zero ? 1ul << 32 : 0);
  return *(__local T*)simt_shared((ulong)&SharedKey<T, ID>::key, sizeof(T), align, (ulong)name);
}

// A kernel's buffer arguments, whatever their declared types.
struct AnyPtr {
  ulong p;
  template <class U> operator const __global U*() const { return (const __global U*)p; }
  template <class U> operator __global U*() const { return (__global U*)p; }
  template <class U> operator const volatile __global U*() const { return (const volatile __global U*)p; }
  template <class U> operator __constant U*() const { return (__constant U*)p; }
  template <class U> operator __local U*() const { return (__local U*)p; }
};
struct AnyRef {
  ulong p;
  template <class U> operator __constant U&() const { return *(__constant U*)p; }
  template <class U> operator __global U&() const { return *(__global U*)p; }
  template <class U> operator const __global U&() const { return *(const __global U*)p; }
};
}  // namespace simt
