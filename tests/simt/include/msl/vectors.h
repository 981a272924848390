// Vector, matrix and array types; conversions and constructors the rewriter writes for them.
#pragma once
#define SIMT_VECTORS(T)                                                                      \
  typedef metal::vec<T, 2> T##2;                                                             \
  typedef metal::vec<T, 3> T##3;                                                             \
  typedef metal::vec<T, 4> T##4;                                                             \
  typedef T packed_##T##2 __attribute__((ext_vector_type(2), aligned(__alignof__(T))));      \
  typedef T packed_##T##4 __attribute__((ext_vector_type(4), aligned(__alignof__(T))));      \
  struct packed_##T##3 { /* 3 elements in size, unlike T3 */                                 \
    T x, y, z;                                                                               \
    operator T##3() const { return T##3{x, y, z}; }                                          \
    operator T##3() const __global { return T##3{x, y, z}; }                                 \
  };
SIMT_VECTORS(float)
SIMT_VECTORS(half)
SIMT_VECTORS(bfloat)
SIMT_VECTORS(char)
SIMT_VECTORS(uchar)
SIMT_VECTORS(short)
SIMT_VECTORS(ushort)
SIMT_VECTORS(int)
SIMT_VECTORS(uint)
SIMT_VECTORS(long)
SIMT_VECTORS(ulong)
#undef SIMT_VECTORS
typedef int bool2 __attribute__((ext_vector_type(2)));
typedef int bool3 __attribute__((ext_vector_type(3)));
typedef int bool4 __attribute__((ext_vector_type(4)));

namespace metal {
template <class T, int N>
struct array {
  T v[N];
  T& operator[](int i) { return v[i]; }
  const T& operator[](int i) const { return v[i]; }
  constexpr size_t size() const { return N; }
};

template <class T, int C, int R>
struct matrix {
  vec<T, R> c[C];
  vec<T, R>& operator[](int i) { return c[i]; }
  const vec<T, R>& operator[](int i) const { return c[i]; }
};
template <class T, int C, int R>
inline matrix<T, C, R> operator*(matrix<T, C, R> m, T s) {
  for (int i = 0; i < C; i++) m.c[i] *= s;
  return m;
}
template <class T, int C, int R>
inline vec<T, R> operator*(matrix<T, C, R> m, vec<T, C> v) {
  vec<T, R> sum = m.c[0] * v[0];
  for (int i = 1; i < C; i++) sum += m.c[i] * v[i];
  return sum;
}
}  // namespace metal
#define SIMT_MATRICES(T)                   \
  typedef metal::matrix<T, 2, 2> T##2x2;   \
  typedef metal::matrix<T, 3, 3> T##3x3;   \
  typedef metal::matrix<T, 4, 4> T##4x4;   \
  typedef metal::matrix<T, 2, 4> T##2x4;
SIMT_MATRICES(float)
SIMT_MATRICES(half)
SIMT_MATRICES(bfloat)
#undef SIMT_MATRICES

namespace msl {
using namespace metal;

// static_cast<To>(x), To(x): also element by element, from one number to all, half <-> bfloat.
template <class To, class From>
METAL_FUNC constexpr To cast1(From x) {
  constexpr bool halves = (is_same_v<To, bfloat> && is_same_v<From, half>) ||
                          (is_same_v<To, half> && is_same_v<From, bfloat>);
  if constexpr (is_same_v<To, From>) return x;
  else if constexpr (is_vec_v<To> && is_vec_v<From>) return __builtin_convertvector(x, To);
  else if constexpr (is_vec_v<To>) return (To)cast1<elem_t<To>>(x);
  else if constexpr (halves) return static_cast<To>((float)x);
  else return static_cast<To>(x);
}

template <class E, class V>
METAL_FUNC void append(thread E* to, thread int& n, V v) {
  if constexpr (is_vec_v<V>) {
    for (int k = 0; k < is_vec<V>::n; k++) to[n++] = cast1<E>(v[k]);
  } else {
    to[n++] = cast1<E>(v);
  }
}

// float4(...): nothing, one value, or parts that add up.
template <class To> METAL_FUNC constexpr To mk() { return (To)0; }
template <class To, class A> METAL_FUNC constexpr To mk(A a) { return cast1<To>(a); }
template <class To, class A, class B, class... Rest>
METAL_FUNC To mk(A a, B b, Rest... rest) {
  elem_t<To> parts[is_vec<To>::n + 8];
  int n = 0;
  append(parts, n, a);
  append(parts, n, b);
  (append(parts, n, rest), ...);
  To v;
  for (int k = 0; k < is_vec<To>::n; k++) v[k] = parts[k];
  return v;
}
}  // namespace msl

template <class To, class From>
METAL_FUNC constexpr To as_type(From x) {
  return __builtin_bit_cast(To, x);
}
template <class To> METAL_FUNC constexpr To as_type(To x) { return x; }
namespace metal {
using ::as_type;
template <class T> using uniform = T;
template <class T> METAL_FUNC constexpr T make_uniform(T x) { return x; }
template <class T> METAL_FUNC bool is_function_constant_defined(T) { return true; }
}  // namespace metal
