// <metal_math> for float, half and their vectors. What Metal leaves inexact is the engine's
// (engine/math.cpp), so that a run can add an error to it; the rest rounds correctly.
#pragma once
namespace metal {
// A bfloat goes through float, as Metal's overloads make it.
#define SIMT_BFLOAT(NAME)                                                          \
  template <class T, class = enable_if_t<is_same_v<T, bfloat>>, class = void>      \
  METAL_FUNC float NAME(T x) {                                                     \
    return NAME((float)x);                                                         \
  }

#define SIMT_EXACT(NAME, BUILTIN)                        \
  template <class T, class = enable_if_t<is_fp_<T>>>     \
  METAL_FUNC T NAME(T x) {                               \
    return BUILTIN(x);                                   \
  }                                                      \
  SIMT_BFLOAT(NAME)
SIMT_EXACT(sqrt, __builtin_elementwise_sqrt)
SIMT_EXACT(floor, __builtin_elementwise_floor)
SIMT_EXACT(ceil, __builtin_elementwise_ceil)
SIMT_EXACT(trunc, __builtin_elementwise_trunc)
SIMT_EXACT(rint, __builtin_elementwise_rint)
SIMT_EXACT(round, __builtin_elementwise_round)
SIMT_EXACT(fabs, __builtin_elementwise_abs)
#undef SIMT_EXACT

#define SIMT_INEXACT(NAME, NUMBER)                                                            \
  template <class T, class = enable_if_t<is_fp_<T>>>                                          \
  METAL_FUNC T NAME(T x) {                                                                    \
    if constexpr (is_vec_v<T>) {                                                              \
      T r;                                                                                    \
      for (int i = 0; i < is_vec<T>::n; i++) r[i] = (elem_t<T>)simt::simt_m1(NUMBER, (float)x[i]); \
      return r;                                                                               \
    } else {                                                                                  \
      return (T)simt::simt_m1(NUMBER, (float)x);                                              \
    }                                                                                         \
  }                                                                                           \
  SIMT_BFLOAT(NAME)
SIMT_INEXACT(exp, 0)
SIMT_INEXACT(exp2, 1)
SIMT_INEXACT(log, 2)
SIMT_INEXACT(log2, 3)
SIMT_INEXACT(sin, 4)
SIMT_INEXACT(cos, 5)
SIMT_INEXACT(tan, 6)
SIMT_INEXACT(tanh, 7)
SIMT_INEXACT(sinh, 8)
SIMT_INEXACT(cosh, 9)
SIMT_INEXACT(asin, 10)
SIMT_INEXACT(acos, 11)
SIMT_INEXACT(atan, 12)
SIMT_INEXACT(exp10, 13)
SIMT_INEXACT(log10, 14)
SIMT_INEXACT(rsqrt, 15)
SIMT_INEXACT(asinh, 16)
SIMT_INEXACT(acosh, 17)
SIMT_INEXACT(atanh, 18)
SIMT_INEXACT(cospi, 19)
SIMT_INEXACT(sinpi, 20)
#undef SIMT_INEXACT

#define SIMT_BINARY(NAME, NUMBER)                                                            \
  METAL_FUNC float NAME(float x, float y) { return simt::simt_m2(NUMBER, x, y); }            \
  METAL_FUNC half NAME(half x, half y) { return (half)simt::simt_m2(NUMBER, x, y); }         \
  template <class T, int N>                                                                  \
  METAL_FUNC vec<T, N> NAME(vec<T, N> x, vec<T, N> y) {                                      \
    vec<T, N> r;                                                                             \
    for (int i = 0; i < N; i++) r[i] = NAME(x[i], y[i]);                                     \
    return r;                                                                                \
  }
SIMT_BINARY(pow, 0)
SIMT_BINARY(powr, 0)
SIMT_BINARY(atan2, 1)
SIMT_BINARY(fmod, 2)
#undef SIMT_BINARY

METAL_FUNC float fma(float a, float b, float c) { return __builtin_elementwise_fma(a, b, c); }
METAL_FUNC half fma(half a, half b, half c) { return __builtin_elementwise_fma(a, b, c); }
template <class T, int N>
METAL_FUNC vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  return __builtin_elementwise_fma(a, b, c);
}

template <class T, class = enable_if_t<is_fp_<T>>>
METAL_FUNC T fract(T x) {
  return x - floor(x);
}
template <class T> METAL_FUNC T divide(T a, T b) { return a / b; }
template <class T> METAL_FUNC T fdim(T a, T b) { return a > b ? a - b : (T)0; }

template <class T, class = enable_if_t<is_floating_point_v<T>>>
METAL_FUNC bool isnan(T x) {
  return x != x;
}
template <class T, class = enable_if_t<is_floating_point_v<T>>>
METAL_FUNC bool isinf(T x) {
  float f = (float)x;
  return f == numeric_limits<float>::infinity() || f == -numeric_limits<float>::infinity();
}
template <class T, class = enable_if_t<is_floating_point_v<T>>>
METAL_FUNC bool isfinite(T x) {
  return !isnan(x) && !isinf(x);
}
template <class T, class = enable_if_t<is_floating_point_v<T>>>
METAL_FUNC bool signbit(T x) {
  return as_type<uint>((float)x) >> 31;
}
template <class T> METAL_FUNC T copysign(T a, T b) { return signbit(a) == signbit(b) ? a : -a; }

template <class T> METAL_FUNC T ldexp(T x, int e) { return (T)simt::simt_m2(3, (float)x, (float)e); }
template <class T>
METAL_FUNC T frexp(T x, thread int& e) {
  e = 0;
  if (x == 0 || !isfinite(x)) return x;
  uint bits = as_type<uint>((float)x);
  int shift = 0;
  if (!(bits & 0x7f800000)) {  // a denormal
    bits = as_type<uint>((float)x * 16777216.0f);
    shift = -24;
  }
  e = (int)((bits >> 23) & 255) - 126 + shift;
  return (T)as_type<float>((bits & 0x807fffffu) | 0x3f000000u);
}
template <class T>
METAL_FUNC int ilogb(T x) {
  int e;
  frexp(x, e);
  return e - 1;
}
template <class T>
METAL_FUNC T nextafter(T x, T to) {
  using Bits = conditional_t<sizeof(T) == 2, ushort, uint>;
  if (isnan(x) || isnan(to)) return x + to;
  if (x == to) return to;
  if (x == 0) return as_type<T>((Bits)(signbit(to) ? 1 | (Bits)1 << (8 * sizeof(T) - 1) : 1));
  Bits bits = as_type<Bits>(x);
  return as_type<T>((Bits)((x < to) == (x > 0) ? bits + 1 : bits - 1));  // away from zero, or back
}
template <class T>
METAL_FUNC T modf(T x, thread T& whole) {
  whole = trunc(x);
  return x - whole;
}
template <class T>
METAL_FUNC T sincos(T x, thread T& cosine) {
  cosine = cos(x);
  return sin(x);
}
}  // namespace metal
