// Keywords, vector types, and where a thread is.
#pragma once
#include <algorithm>
#include <assert.h>
#include <cmath>
#include <initializer_list>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../../simt/abi.h"

#define __CUDACC__ 1
#define __CUDA_ARCH__ 900
#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__ __restrict
#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("")

// Default arguments that name the caller's line: findings show it.
#define SIMT_SITE const char* file = __builtin_FILE(), uint32_t line = __builtin_LINE()

#define SIMT_VECTOR(T, name)                                             \
  struct name##1 { T x; };                                               \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                     \
  struct name##3 { T x, y, z; };                                         \
  struct alignas(sizeof(T) > 4 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; }; \
  inline name##1 make_##name##1(T x) { return {x}; }                     \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }             \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }     \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTOR(signed char, char)
SIMT_VECTOR(unsigned char, uchar)
SIMT_VECTOR(short, short)
SIMT_VECTOR(unsigned short, ushort)
SIMT_VECTOR(int, int)
SIMT_VECTOR(unsigned int, uint)
SIMT_VECTOR(long, long)
SIMT_VECTOR(unsigned long, ulong)
SIMT_VECTOR(long long, longlong)
SIMT_VECTOR(unsigned long long, ulonglong)
SIMT_VECTOR(float, float)
SIMT_VECTOR(double, double)
#undef SIMT_VECTOR

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  operator uint3() const { return {x, y, z}; }
};

namespace simt_cuda {
using namespace simt;
inline uint3 position(U3 v) { return {v.x, v.y, v.z}; }
inline uint32_t lane() { return tls.cur->lane; }
template <class T> T& operand(Lane* l) { return *static_cast<T*>(l->val); }
template <class To, class From> To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits are neither added nor lost");
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}
}  // namespace simt_cuda

#define threadIdx (simt_cuda::position(simt::tls.cur->tid))
#define blockIdx (simt_cuda::position(simt::tls.g.gid))
#define blockDim (simt_cuda::position(simt::tls.g.gsize))
#define gridDim (simt_cuda::position(simt::tls.g.ngroups))
#define warpSize 32
