// From a kernel, a struct with `static void run(arrays..., sizes...)`, to a __global__ function, and from its C++ text
// to that. All have one parameter, so that one call starts any of them (csrc/bind/cuda.cpp).
#pragma once
#include <cuda_runtime.h>

#include <utility>

namespace hm {

struct Arguments {
  const void* array[24];  // in order; nullptr for an absent one
  int size[32];           // in order; a float as its bits
};

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
  static __device__ void run(const Arguments& a, std::index_sequence<I...>) {
    K::run(Argument<P>::get(a, int(I), int(I) - ARRAYS)...);  // sizes follow arrays
  }
};

template <class K>
__global__ __launch_bounds__(K::THREADS) void kernel(const __grid_constant__ Arguments a) {
  using Run = Call<decltype(&K::run)>;
  Run::template run<K>(a, std::make_index_sequence<Run::PARAMETERS>());
}

struct Entry {
  const char* name;  // its C++ text: hadamoe.cuda_plan.Launch.name
  const void* kernel;
};
struct Table {
  const Entry* entries;
  int count;
};

}  // namespace hm

// The kernels that a file compiles: `hm::NAME_kernels`. cuda/kernels.h names all tables.
#define HM_KERNEL(...) \
  hm::Entry { #__VA_ARGS__, reinterpret_cast<const void*>(&hm::kernel<hm::__VA_ARGS__>) }
#define HM_KERNELS(NAME, ...)                                              \
  static const hm::Entry NAME##_entries[] = {__VA_ARGS__};                 \
  extern const hm::Table hm_##NAME##_kernels;                              \
  const hm::Table hm_##NAME##_kernels{NAME##_entries, int(sizeof(NAME##_entries) / sizeof(hm::Entry))}
