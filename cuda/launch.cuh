// From a kernel, a struct with `static void run(arrays..., sizes...)`, to a __global__ function, and from its C++ text
// to that. All have one parameter, so that one call starts any of them (csrc/bind/cuda.cpp).
#pragma once
#include <cuda_runtime.h>

#include <utility>

#include "bounds.cuh"
#include "table.h"

namespace hm {

template <class T>
struct Argument;
template <class T>
struct Argument<T*> {
  enum { SIZES = 0 };
  static __device__ T* get(const Arguments& a, int array, int) {
    return static_cast<T*>(const_cast<void*>(a.array[array]));
  }
};
template <>
struct Argument<int> {
  enum { SIZES = 1 };
  static __device__ int get(const Arguments& a, int, int size) { return a.size[size]; }
};
template <>
struct Argument<float> {
  enum { SIZES = 1 };
  static __device__ float get(const Arguments& a, int, int size) { return __int_as_float(a.size[size]); }
};

template <class F>
struct Call;
template <class... P>
struct Call<void (*)(P...)> {
  static constexpr int PARAMETERS = sizeof...(P);
  static constexpr int ARRAYS = int(sizeof...(P)) - (0 + ... + int(Argument<P>::SIZES));
  template <class K, size_t... I>
  static __device__ __forceinline__ void run(const Arguments& a, std::index_sequence<I...>) {
    K::run(Argument<P>::get(a, int(I), int(I) - ARRAYS)...);  // sizes follow arrays
  }
};

template <class K>
__global__ HM_BOUNDS(K) void kernel(const __grid_constant__ Arguments a) {
  using Run = Call<decltype(&K::run)>;
  Run::template run<K>(a, std::make_index_sequence<Run::PARAMETERS>());
}

template <class K>
constexpr Entry entry(const char* name) {
  using Run = Call<decltype(&K::run)>;
  static_assert(Run::ARRAYS <= Arguments::ARRAYS && Run::PARAMETERS - Run::ARRAYS <= Arguments::SIZES);
  return {name, reinterpret_cast<const void*>(&kernel<K>), Run::ARRAYS, Run::PARAMETERS - Run::ARRAYS, K::THREADS};
}

}  // namespace hm

// The kernels that cuda/STEM.cu compiles.
#define HM_KERNEL(...) hm::entry<hm::__VA_ARGS__>(#__VA_ARGS__)
#define HM_KERNELS(STEM, ...)                             \
  static const hm::Entry STEM##_entries[] = {__VA_ARGS__}; \
  extern const hm::Table hm_##STEM##_kernels;              \
  const hm::Table hm_##STEM##_kernels{STEM##_entries, int(sizeof(STEM##_entries) / sizeof(hm::Entry))}
