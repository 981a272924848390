// Apple's internal spellings that MLX's own headers (bf16_math.h, logging.h) call.
#pragma once
namespace metal {
#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 0

#define SIMT_ALIAS(NAME)                      \
  template <class T>                          \
  METAL_FUNC auto __metal_##NAME(T x, int) {  \
    return NAME(x);                           \
  }
SIMT_ALIAS(fabs) SIMT_ALIAS(acos) SIMT_ALIAS(acosh) SIMT_ALIAS(asin) SIMT_ALIAS(asinh)
SIMT_ALIAS(atan) SIMT_ALIAS(atanh) SIMT_ALIAS(ceil) SIMT_ALIAS(cos) SIMT_ALIAS(cosh)
SIMT_ALIAS(cospi) SIMT_ALIAS(exp) SIMT_ALIAS(exp2) SIMT_ALIAS(exp10) SIMT_ALIAS(floor)
SIMT_ALIAS(fract) SIMT_ALIAS(log) SIMT_ALIAS(log2) SIMT_ALIAS(log10) SIMT_ALIAS(rint)
SIMT_ALIAS(round) SIMT_ALIAS(rsqrt) SIMT_ALIAS(sin) SIMT_ALIAS(sinh) SIMT_ALIAS(sinpi)
SIMT_ALIAS(sqrt) SIMT_ALIAS(tan) SIMT_ALIAS(tanh) SIMT_ALIAS(trunc) SIMT_ALIAS(isfinite)
SIMT_ALIAS(isinf) SIMT_ALIAS(isnan) SIMT_ALIAS(signbit)
#undef SIMT_ALIAS
#define SIMT_ALIAS(NAME)                           \
  template <class T>                               \
  METAL_FUNC T __metal_##NAME(T x, T y, int) {     \
    return (T)NAME(x, y);                          \
  }
SIMT_ALIAS(fmax) SIMT_ALIAS(fmin) SIMT_ALIAS(pow) SIMT_ALIAS(powr) SIMT_ALIAS(fmod)
SIMT_ALIAS(atan2) SIMT_ALIAS(divide)
#undef SIMT_ALIAS
template <class T> METAL_FUNC T __metal_tanpi(T x, int) { return tan(x * (T)M_PI_F); }
template <class T> METAL_FUNC bool __metal_isnormal(T x, int) {
  return isfinite(x) && fabs((float)x) >= FLT_MIN;
}
template <class T> METAL_FUNC bool __metal_signbit(T x) { return signbit(x); }
template <class T> METAL_FUNC T __metal_fdim(T x, T y) { return fdim(x, y); }
template <class T> METAL_FUNC T __metal_fma(T a, T b, T c) { return (T)fma(a, b, c); }
template <class T> METAL_FUNC T __metal_fmax3(T a, T b, T c, int) { return max3(a, b, c); }
template <class T> METAL_FUNC T __metal_fmin3(T a, T b, T c, int) { return min3(a, b, c); }
template <class T> METAL_FUNC T __metal_fmedian3(T a, T b, T c, int) { return median3(a, b, c); }
template <class T> METAL_FUNC T __metal_ldexp(T x, int e, int) { return ldexp(x, e); }
template <class T> METAL_FUNC T __metal_copysign(T x, T y) { return copysign(x, y); }
template <class T> METAL_FUNC T __metal_nextafter(T x, T to) { return nextafter(x, to); }
template <class T> METAL_FUNC int __metal_ilogb(T x, int) { return ilogb(x); }
template <class T> METAL_FUNC T __metal_frexp(T x, thread int* e, int = 0) { return frexp(x, *e); }
template <class T> METAL_FUNC T __metal_modf(T x, thread T* whole, int = 0) {
  return modf(x, *whole);
}
template <class T> METAL_FUNC T __metal_sincos(T x, thread T* c, int) { return sincos(x, *c); }
METAL_FUNC ushort __metal_get_simdgroup_size(ushort) { return (ushort)simt::group()->width; }

// What MLX calls for the bits of a bfloat.
#define SIMT_ALIAS(NAME)                                      \
  template <class T>                                          \
  METAL_FUNC T __metal_##NAME(T v, SIMT_SITE) {               \
    return NAME(v, simt_f, simt_l);                           \
  }
SIMT_ALIAS(simd_sum) SIMT_ALIAS(simd_product) SIMT_ALIAS(simd_min) SIMT_ALIAS(simd_max)
SIMT_ALIAS(simd_and) SIMT_ALIAS(simd_or) SIMT_ALIAS(simd_xor) SIMT_ALIAS(simd_broadcast_first)
SIMT_ALIAS(simd_prefix_inclusive_sum) SIMT_ALIAS(simd_prefix_exclusive_sum)
SIMT_ALIAS(simd_prefix_inclusive_product) SIMT_ALIAS(simd_prefix_exclusive_product)
#undef SIMT_ALIAS
#define SIMT_ALIAS(NAME)                                      \
  template <class T>                                          \
  METAL_FUNC T __metal_##NAME(T v, ushort a, SIMT_SITE) {     \
    return NAME(v, a, simt_f, simt_l);                        \
  }
SIMT_ALIAS(simd_shuffle) SIMT_ALIAS(simd_broadcast) SIMT_ALIAS(simd_shuffle_xor)
SIMT_ALIAS(simd_shuffle_up) SIMT_ALIAS(simd_shuffle_down) SIMT_ALIAS(simd_shuffle_rotate_up)
SIMT_ALIAS(simd_shuffle_rotate_down) SIMT_ALIAS(quad_shuffle) SIMT_ALIAS(quad_broadcast)
SIMT_ALIAS(quad_shuffle_xor)
#undef SIMT_ALIAS
#define SIMT_ALIAS(NAME)                                                       \
  template <class T>                                                           \
  METAL_FUNC T __metal_##NAME(T v, T fill, ushort by, ushort, SIMT_SITE) {     \
    return NAME(v, fill, by, simt_f, simt_l);                                  \
  }
SIMT_ALIAS(simd_shuffle_and_fill_up) SIMT_ALIAS(simd_shuffle_and_fill_down)
#undef SIMT_ALIAS

struct os_log {
  constexpr os_log(const constant char*, const constant char*) {}
  constexpr os_log(const constant char*, const constant char*) __constant {}
  template <class... A> void log_debug(const constant char*, A...) const __constant {}
  template <class... A> void log_debug(const constant char*, A...) const {}
  template <class... A> void log(const constant char*, A...) const {}
};
}  // namespace metal
