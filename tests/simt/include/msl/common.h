// <metal_common>, <metal_relational>, <metal_geometric>: minima, clamps, choices, products.
#pragma once
namespace metal {
template <class T, class = enable_if_t<is_fp_<T> || is_int_<T>>>
METAL_FUNC T abs(T x) {
  if constexpr (!is_int_<T>) return __builtin_elementwise_abs(x);
  else if constexpr (is_signed_v<elem_t<T>>) return x < 0 ? -x : x;
  else return x;
}
SIMT_BFLOAT(abs)

// A NaN loses to a number.
template <class T>
METAL_FUNC constexpr T min(T a, T b) {
  if constexpr (is_vec_v<T>) return __builtin_elementwise_min(a, b);
  else if constexpr (is_floating_point_v<T>) return a != a ? b : b != b ? a : b < a ? b : a;
  else return b < a ? b : a;
}
template <class T>
METAL_FUNC constexpr T max(T a, T b) {
  if constexpr (is_vec_v<T>) return __builtin_elementwise_max(a, b);
  else if constexpr (is_floating_point_v<T>) return a != a ? b : b != b ? a : a < b ? b : a;
  else return a < b ? b : a;
}

// Numbers of two types are ambiguous in Metal, but for a bfloat beside a float.
#define SIMT_MIXED(NAME)                                                                       \
  template <class A, class B,                                                                  \
            class = enable_if_t<!is_same_v<A, B> && is_arithmetic_v<A> && is_arithmetic_v<B>>> \
  auto NAME(A a, B b) = delete;                                                                \
  METAL_FUNC float NAME(float a, bfloat b) { return NAME(a, (float)b); }                       \
  METAL_FUNC float NAME(bfloat a, float b) { return NAME((float)a, b); }
SIMT_MIXED(min)
SIMT_MIXED(max)
#undef SIMT_MIXED

#define SIMT_BROADCAST(NAME)                                                                   \
  template <class T, int N>                                                                    \
  METAL_FUNC vec<T, N> NAME(vec<T, N> a, T b) {                                                \
    return NAME(a, (vec<T, N>)b);                                                              \
  }                                                                                            \
  template <class T, int N>                                                                    \
  METAL_FUNC vec<T, N> NAME(T a, vec<T, N> b) {                                                \
    return NAME((vec<T, N>)a, b);                                                              \
  }
SIMT_BROADCAST(min)
SIMT_BROADCAST(max)
#undef SIMT_BROADCAST

template <class T> METAL_FUNC T fmin(T a, T b) { return min(a, b); }
template <class T> METAL_FUNC T fmax(T a, T b) { return max(a, b); }
template <class T> METAL_FUNC T min3(T a, T b, T c) { return min(a, min(b, c)); }
template <class T> METAL_FUNC T max3(T a, T b, T c) { return max(a, max(b, c)); }
template <class T>
METAL_FUNC T median3(T a, T b, T c) {
  return max(min(a, b), min(max(a, b), c));
}
template <class T> METAL_FUNC T clamp(T x, T low, T high) { return min(max(x, low), high); }
template <class T, class A, class B,
          class = enable_if_t<is_arithmetic_v<T> && is_arithmetic_v<A> &&
                              !(is_same_v<T, A> && is_same_v<T, B>)>>
T clamp(T x, A low, B high) = delete;
template <class T, int N>
METAL_FUNC vec<T, N> clamp(vec<T, N> x, T low, T high) {
  return min(max(x, low), high);
}
template <class T> METAL_FUNC T saturate(T x) { return clamp(x, (T)0, (T)1); }
template <class T, class W> METAL_FUNC T mix(T a, T b, W w) { return a + (b - a) * w; }
template <class T>
METAL_FUNC T sign(T x) {
  return x > (T)0 ? (T)1 : x < (T)0 ? (T)-1 : (T)0;
}
template <class T> METAL_FUNC T step(T edge, T x) { return x < edge ? (T)0 : (T)1; }
template <class T>
METAL_FUNC T smoothstep(T low, T high, T x) {
  T t = saturate((x - low) / (high - low));
  return t * t * ((T)3 - (T)2 * t);
}

template <class T> METAL_FUNC T select(T a, T b, bool c) { return c ? b : a; }
template <class T, int N, class C>
METAL_FUNC vec<T, N> select(vec<T, N> a, vec<T, N> b, C c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) {
    if constexpr (is_vec_v<C>) r[i] = c[i] ? b[i] : a[i];
    else r[i] = c ? b[i] : a[i];
  }
  return r;
}
template <class V>
METAL_FUNC bool any(V v) {
  if constexpr (!is_vec_v<V>) return (bool)v;
  else {
    bool r = false;
    for (int i = 0; i < is_vec<V>::n; i++) r |= !!v[i];
    return r;
  }
}
template <class V>
METAL_FUNC bool all(V v) {
  if constexpr (!is_vec_v<V>) return (bool)v;
  else {
    bool r = true;
    for (int i = 0; i < is_vec<V>::n; i++) r &= !!v[i];
    return r;
  }
}

template <class T, int N>
METAL_FUNC T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; i++) sum += a[i] * b[i];
  return sum;
}
template <class T, int N> METAL_FUNC T length_squared(vec<T, N> a) { return dot(a, a); }
template <class T, int N> METAL_FUNC T length(vec<T, N> a) { return sqrt(dot(a, a)); }
template <class T, int N> METAL_FUNC T distance(vec<T, N> a, vec<T, N> b) { return length(a - b); }
template <class T, int N>
METAL_FUNC vec<T, N> normalize(vec<T, N> a) {
  return a * rsqrt(dot(a, a));
}
template <class T>
METAL_FUNC vec<T, 3> cross(vec<T, 3> a, vec<T, 3> b) {
  return a.yzx * b.zxy - a.zxy * b.yzx;
}
#undef SIMT_BFLOAT

// The same functions: precision is a matter of `ulp`. Declared one by one, because MLX's headers add
// overloads for bfloat to these namespaces, which would hide what a using-directive brings.
#define SIMT_SAME \
  using metal::sqrt; using metal::floor; using metal::ceil; using metal::trunc; \
  using metal::rint; using metal::round; using metal::fabs; using metal::exp; using metal::exp2; \
  using metal::log; using metal::log2; using metal::sin; using metal::cos; using metal::tan; \
  using metal::tanh; using metal::sinh; using metal::cosh; using metal::asin; using metal::acos; \
  using metal::atan; using metal::exp10; using metal::log10; using metal::rsqrt; \
  using metal::asinh; using metal::acosh; using metal::atanh; using metal::cospi; \
  using metal::sinpi; using metal::pow; using metal::powr; using metal::atan2; using metal::fmod; \
  using metal::fma; using metal::fract; using metal::divide; using metal::fdim; \
  using metal::isnan; using metal::isinf; using metal::isfinite; using metal::signbit; \
  using metal::copysign; using metal::ldexp; using metal::frexp; using metal::ilogb; \
  using metal::nextafter; using metal::modf; using metal::sincos; using metal::abs; \
  using metal::min; using metal::max; using metal::fmin; using metal::fmax; using metal::min3; \
  using metal::max3; using metal::median3; using metal::clamp; using metal::saturate; \
  using metal::mix; using metal::sign; using metal::step; using metal::smoothstep; \
  using metal::normalize; using metal::length; using metal::distance;
namespace precise {
SIMT_SAME
}
namespace fast {
SIMT_SAME
}
#undef SIMT_SAME
}  // namespace metal
