// MSL-on-CPU shim. Compiled as C++ for OpenCL 2021 by stock clang (-x cl -cl-std=clc++2021), which gives
// real address spaces, native vectors with swizzles, native half, float-only literals and no double.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable
#define device __global
#define threadgroup __local
#define thread __private
#define constant const __constant
#define METAL_FUNC inline __attribute__((__always_inline__))
typedef unsigned char uchar; typedef unsigned short ushort; typedef unsigned int uint; typedef unsigned long ulong;
typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long int64_t;
typedef uchar uint8_t; typedef ushort uint16_t; typedef uint uint32_t; typedef ulong uint64_t;
typedef ulong size_t; typedef long ptrdiff_t; typedef ulong uintptr_t; typedef long intptr_t;
typedef __bf16 bfloat;
#define __SIMT_METAL__ 1
// ------------------------------------------------------------------ engine ABI
namespace simt {
struct U3 { uint x, y, z; };
struct Lane; 
typedef void (*ResolveFn)(Lane* thread* lanes, int n, Lane* thread* by_lane, int width);
struct Lane { void* sp; uchar st; uchar flags; ushort lane; uint simd; uint lin; U3 tid; void thread* val; ulong arg; ulong need; ResolveFn rf; ulong file; uint line; };
struct GroupInfo { U3 gid, ngroups, gsize, gsize_nominal, grid; uint width, nthreads, nsimd, group_lin; uchar cuda; uchar order; };
extern "C" {
void simt_block_coll(void thread* val, ulong arg, ulong need, ulong rf, ulong file, uint line);
void simt_barrier(uint flags, ulong file, uint line);
void simt_simd_barrier(uint flags, ulong need, ulong file, uint line);
ulong simt_shared(ulong key, ulong size, ulong align, ulong name);
ulong simt_dyn_shared(uint index);
void simt_note_atomic(ulong p, ulong n, int wr, ulong pc);
ulong simt_cur(); ulong simt_group();
float simt_m1(int f, float x); float simt_m2(int f, float x, float y);
void simt_fail(ulong kind, ulong msg, ulong file, uint line);
}
#define SIMT_SITE ulong simt_f = (ulong)__builtin_FILE(), uint simt_l = __builtin_LINE()
template <class T, int ID> struct SharedKey { static constexpr __constant char key = 0; };
template <class T, int ID> inline __attribute__((always_inline)) __local T& shared(const __constant char* name, int zero = 0) {
  return *(__local T*)simt_shared((ulong)&SharedKey<T, ID>::key, sizeof(T), (alignof(T) < 16 ? 16 : alignof(T)) | (zero ? 1ul << 32 : 0), (ulong)name);
}
template <class T> struct DynPtr;
struct AnyPtr { ulong p;
  template <class U> operator const __global U*() const { return (const __global U*)p; }
  template <class U> operator __global U*() const { return (__global U*)p; }
  template <class U> operator const volatile __global U*() const { return (const volatile __global U*)p; }
  template <class U> operator __constant U*() const { return (__constant U*)p; }
  template <class U> operator __local U*() const { return (__local U*)p; } };
struct AnyRef { ulong p;
  template <class U> operator __constant U&() const { return *(__constant U*)p; }
  template <class U> operator __global U&() const { return *(__global U*)p; }
  template <class U> operator const __global U&() const { return *(const __global U*)p; } };
}
namespace metal {
// ------------------------------------------------------------------ traits
template <class T, T V> struct integral_constant { static constexpr __constant T value = V; using value_type = T; using type = integral_constant; constexpr operator T() const { return V; } constexpr T operator()() const { return V; } };
template <bool B> using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>; using false_type = bool_constant<false>;
template <bool B, class T = void> struct enable_if {}; template <class T> struct enable_if<true, T> { using type = T; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class F> struct conditional { using type = T; }; template <class T, class F> struct conditional<false, T, F> { using type = F; };
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;
template <class A, class B> struct is_same : false_type {}; template <class A> struct is_same<A, A> : true_type {};
template <class A, class B> constexpr __constant bool is_same_v = is_same<A, B>::value;
template <class T> struct remove_const { using type = T; }; template <class T> struct remove_const<const T> { using type = T; };
template <class T> struct remove_volatile { using type = T; }; template <class T> struct remove_volatile<volatile T> { using type = T; };
template <class T> struct remove_cv { using type = typename remove_const<typename remove_volatile<T>::type>::type; };
template <class T> using remove_cv_t = typename remove_cv<T>::type; template <class T> using remove_const_t = typename remove_const<T>::type;
template <class T> struct remove_addrspace { using type = T; };
template <class T> struct remove_addrspace<__global T> { using type = T; }; template <class T> struct remove_addrspace<__local T> { using type = T; };
template <class T> struct remove_addrspace<__private T> { using type = T; }; template <class T> struct remove_addrspace<__constant T> { using type = T; };
template <class T> using remove_addrspace_t = typename remove_addrspace<T>::type;
template <class T> struct remove_reference { using type = T; }; template <class T> struct remove_reference<__private T&> { using type = T; };
template <class T> struct remove_reference<__global T&> { using type = T; }; template <class T> struct remove_reference<__local T&> { using type = T; }; template <class T> struct remove_reference<__constant T&> { using type = T; };
template <class T> struct remove_reference<T&&> { using type = T; };
template <class T> using remove_reference_t = typename remove_reference<T>::type;
template <class T> using decay_t = remove_cv_t<remove_reference_t<T>>;
template <class T> struct is_integral : false_type {}; template <class T> struct is_floating_point : false_type {}; template <class T> struct is_signed_ : false_type {};
#define SIMT_INT(T, S) template <> struct is_integral<T> : true_type {}; template <> struct is_signed_<T> : bool_constant<S> {};
SIMT_INT(bool, false) SIMT_INT(char, true) SIMT_INT(signed char, true) SIMT_INT(uchar, false) SIMT_INT(short, true) SIMT_INT(ushort, false) SIMT_INT(int, true) SIMT_INT(uint, false) SIMT_INT(long, true) SIMT_INT(ulong, false) SIMT_INT(long long, true) SIMT_INT(unsigned long long, false)
#undef SIMT_INT
template <> struct is_floating_point<float> : true_type {}; template <> struct is_floating_point<half> : true_type {}; template <> struct is_floating_point<bfloat> : true_type {};
template <class T> constexpr __constant bool is_integral_v = is_integral<remove_cv_t<T>>::value;
template <class T> constexpr __constant bool is_floating_point_v = is_floating_point<remove_cv_t<T>>::value;
template <class T> constexpr __constant bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <class T> struct is_arithmetic : bool_constant<is_arithmetic_v<T>> {};
template <class T> constexpr __constant bool is_signed_v = is_signed_<T>::value || is_floating_point_v<T>;
template <class T> constexpr __constant bool is_unsigned_v = is_integral_v<T> && !is_signed_v<T>;
template <class F, class T> constexpr __constant bool is_convertible_v = __is_convertible_to(F, T);
template <class F, class T> struct is_convertible : bool_constant<__is_convertible_to(F, T)> {};
template <class T> struct make_unsigned { using type = T; }; template <> struct make_unsigned<int> { using type = uint; }; template <> struct make_unsigned<short> { using type = ushort; }; template <> struct make_unsigned<char> { using type = uchar; }; template <> struct make_unsigned<signed char> { using type = uchar; }; template <> struct make_unsigned<long> { using type = ulong; };
template <class T> using make_unsigned_t = typename make_unsigned<T>::type;
template <int... I> struct index_seq_ {};
template <class T> T&& declval();
// ------------------------------------------------------------------ vectors
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
template <class T> struct is_vec : false_type { using elem = T; static constexpr __constant int n = 1; };
template <class T, int N> struct is_vec<T __attribute__((ext_vector_type(N)))> : true_type { using elem = T; static constexpr __constant int n = N; };
template <class T> using elem_t = typename is_vec<T>::elem;
template <class T, int N> struct array { T v[N]; thread T& operator[](int i) { return v[i]; } const thread T& operator[](int i) const { return v[i]; } };
template <class T> constexpr __constant bool is_fp_ = is_same_v<elem_t<T>, float> || is_same_v<elem_t<T>, half>;
template <class T> constexpr __constant bool is_fpb_ = is_fp_<T> || is_same_v<elem_t<T>, bfloat>;
template <class T> constexpr __constant bool is_int_ = is_integral_v<elem_t<T>>;
}
#define SIMT_V(T) typedef metal::vec<T, 2> T##2; typedef metal::vec<T, 3> T##3; typedef metal::vec<T, 4> T##4; \
  struct packed_##T##3 { T x, y, z; operator T##3() const { return T##3{x, y, z}; } operator T##3() const __global { return T##3{x, y, z}; } }; typedef T packed_##T##2 __attribute__((ext_vector_type(2), aligned(__alignof__(T)))); typedef T packed_##T##4 __attribute__((ext_vector_type(4), aligned(__alignof__(T))));
SIMT_V(float) SIMT_V(half) SIMT_V(bfloat) SIMT_V(char) SIMT_V(uchar) SIMT_V(short) SIMT_V(ushort) SIMT_V(int) SIMT_V(uint) SIMT_V(long) SIMT_V(ulong)
typedef int bool2 __attribute__((ext_vector_type(2))); typedef int bool3 __attribute__((ext_vector_type(3))); typedef int bool4 __attribute__((ext_vector_type(4)));
namespace metal { template <class T, int C, int R> struct matrix { vec<T, R> c[C];
  vec<T, R>& operator[](int i) { return c[i]; } const vec<T, R>& operator[](int i) const { return c[i]; } };
template <class T, int C, int R> inline matrix<T, C, R> operator*(matrix<T, C, R> m, T s) { for (int i = 0; i < C; i++) m.c[i] *= s; return m; } }
#define SIMT_MT(T) typedef metal::matrix<T, 2, 2> T##2x2; typedef metal::matrix<T, 3, 3> T##3x3; typedef metal::matrix<T, 4, 4> T##4x4; typedef metal::matrix<T, 2, 4> T##2x4;
SIMT_MT(float) SIMT_MT(half) SIMT_MT(bfloat)
// conversion / construction used by the rewriter for vector types and static_cast
namespace msl {
using namespace metal;
template <class To, class From> METAL_FUNC constexpr To cast1(From x) {
  if constexpr (is_same_v<To, From>) return x;
  else if constexpr (is_vec<To>::value && is_vec<From>::value) return __builtin_convertvector(x, To);
  else if constexpr (is_vec<To>::value) { To r = (To)(elem_t<To>)x; return r; }
  else if constexpr ((is_same_v<To, bfloat> && is_same_v<From, half>) || (is_same_v<To, half> && is_same_v<From, bfloat>)) return static_cast<To>((float)x);
  else return static_cast<To>(x);
}
template <class To> METAL_FUNC constexpr To mk() { return (To)0; }
template <class To, class A> METAL_FUNC constexpr To mk(A a) { return cast1<To>(a); }
template <class T> METAL_FUNC void put(thread elem_t<T>* d, thread int& i, T v) { }
template <class E, class V> METAL_FUNC void app(thread E* d, thread int& i, V v) {
  if constexpr (is_vec<V>::value) { for (int k = 0; k < is_vec<V>::n; k++) d[i++] = (E)v[k]; } else d[i++] = (E)v; }
template <class To, class A, class B, class... R> METAL_FUNC To mk(A a, B b, R... r) {
  elem_t<To> d[is_vec<To>::n + 8]; int i = 0; app(d, i, a); app(d, i, b); (app(d, i, r), ...);
  To v; for (int k = 0; k < is_vec<To>::n; k++) v[k] = d[k]; return v; }
}
template <class To, class From> METAL_FUNC constexpr To as_type(From x) { return __builtin_bit_cast(To, x); }
template <class To> METAL_FUNC constexpr To as_type(To x) { return x; }
namespace metal { using ::as_type;
// ------------------------------------------------------------------ limits
template <class T> struct numeric_limits;
#define SIMT_LI(T, LO, HI) template <> struct numeric_limits<T> { static constexpr T min() { return LO; } static constexpr T max() { return HI; } static constexpr T lowest() { return LO; } static constexpr __constant bool is_signed = LO < 0; static constexpr __constant int digits = 8 * sizeof(T) - (LO < 0); };
SIMT_LI(bool, false, true) SIMT_LI(char, -128, 127) SIMT_LI(signed char, -128, 127) SIMT_LI(uchar, 0, 255) SIMT_LI(short, -32768, 32767) SIMT_LI(ushort, 0, 65535) SIMT_LI(int, (-2147483647 - 1), 2147483647) SIMT_LI(uint, 0, 4294967295u) SIMT_LI(long, (-9223372036854775807l - 1), 9223372036854775807l) SIMT_LI(ulong, 0, 18446744073709551615ul)
#define SIMT_LF(T, U, MX, MN, EP, INF, QN) template <> struct numeric_limits<T> { static constexpr T b(U u) { return __builtin_bit_cast(T, u); } static constexpr T max() { return b(MX); } static constexpr T lowest() { return -b(MX); } static constexpr T min() { return b(MN); } static constexpr T epsilon() { return b(EP); } static constexpr T infinity() { return b(INF); } static constexpr T quiet_NaN() { return b(QN); } };
SIMT_LF(float, uint, 0x7f7fffffu, 0x00800000u, 0x34000000u, 0x7f800000u, 0x7fc00000u) SIMT_LF(half, ushort, 0x7bff, 0x0400, 0x1400, 0x7c00, 0x7e00) SIMT_LF(bfloat, ushort, 0x7f7f, 0x0080, 0x3c00, 0x7f80, 0x7fc0)
// ------------------------------------------------------------------ math
#define SIMT_EB(NAME) template <class T, class = enable_if_t<is_fp_<T>>> METAL_FUNC T NAME(T x)
#define SIMT_BF(NAME) template <class T, class = enable_if_t<is_same_v<T, bfloat>>, class = void> METAL_FUNC float NAME(T x) { return NAME((float)x); }
#define SIMT_E1(NAME, BI) SIMT_EB(NAME) { return BI(x); } SIMT_BF(NAME)
#define SIMT_L1(NAME, ID) SIMT_EB(NAME) { if constexpr (is_vec<T>::value) { T r; for (int i = 0; i < is_vec<T>::n; i++) r[i] = (elem_t<T>)simt::simt_m1(ID, (float)x[i]); return r; } else return (T)simt::simt_m1(ID, (float)x); } SIMT_BF(NAME)
#define SIMT_ALL \
 SIMT_E1(sqrt, __builtin_elementwise_sqrt) SIMT_E1(floor, __builtin_elementwise_floor) SIMT_E1(ceil, __builtin_elementwise_ceil) SIMT_E1(trunc, __builtin_elementwise_trunc) SIMT_E1(rint, __builtin_elementwise_rint) SIMT_E1(round, __builtin_elementwise_round) SIMT_E1(fabs, __builtin_elementwise_abs) \
 SIMT_L1(exp, 0) SIMT_L1(exp2, 1) SIMT_L1(log, 2) SIMT_L1(log2, 3) SIMT_L1(sin, 4) SIMT_L1(cos, 5) SIMT_L1(tan, 6) SIMT_L1(tanh, 7) SIMT_L1(sinh, 8) SIMT_L1(cosh, 9) SIMT_L1(asin, 10) SIMT_L1(acos, 11) SIMT_L1(atan, 12) SIMT_L1(exp10, 13) SIMT_L1(log10, 14) SIMT_L1(rsqrt, 15) SIMT_L1(asinh, 16) SIMT_L1(acosh, 17) SIMT_L1(atanh, 18) SIMT_L1(cospi, 19) SIMT_L1(sinpi, 20) \
 METAL_FUNC float pow(float x, float y) { return simt::simt_m2(0, x, y); } METAL_FUNC half pow(half x, half y) { return (half)simt::simt_m2(0, x, y); } template <class T, int N> METAL_FUNC vec<T, N> pow(vec<T, N> x, vec<T, N> y) { vec<T, N> r; for (int i = 0; i < N; i++) r[i] = (T)simt::simt_m2(0, (float)x[i], (float)y[i]); return r; } \
 template <class T, class = enable_if_t<is_fp_<T>>> METAL_FUNC T powr(T x, T y) { return pow(x, y); } \
 template <class T, class = enable_if_t<is_fp_<T> && !is_vec<T>::value>> METAL_FUNC T atan2(T x, T y) { return (T)simt::simt_m2(1, x, y); } \
 template <class T, class = enable_if_t<is_fp_<T> && !is_vec<T>::value>> METAL_FUNC T fmod(T x, T y) { return (T)simt::simt_m2(2, x, y); } \
 METAL_FUNC float fma(float a, float b, float c) { return __builtin_elementwise_fma(a, b, c); } METAL_FUNC half fma(half a, half b, half c) { return __builtin_elementwise_fma(a, b, c); } \
 template <class T, int N> METAL_FUNC vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) { return __builtin_elementwise_fma(a, b, c); } \
 template <class T, class = enable_if_t<is_fp_<T>>> METAL_FUNC T fract(T x) { return x - floor(x); }
SIMT_ALL
namespace precise { SIMT_ALL } namespace fast { SIMT_ALL }
template <class T, class = enable_if_t<is_fp_<T> || is_int_<T>>> METAL_FUNC T abs(T x) { if constexpr (is_int_<T>) { if constexpr (is_signed_v<elem_t<T>>) return x < 0 ? -x : x; else return x; } else return __builtin_elementwise_abs(x); }
SIMT_BF(abs)
template <class T> METAL_FUNC elem_t<T> simt_min1(T a, T b) { return b < a ? b : a; }
// min/max: two arguments of one type, or mixed arithmetic -> usual conversions (as Metal's overload set resolves)
template <class A, class B> struct common2 { using type = decltype(A() + B()); };
template <class T> METAL_FUNC constexpr T min(T a, T b) { if constexpr (is_vec<T>::value) return __builtin_elementwise_min(a, b); else if constexpr (is_floating_point_v<T>) return (a != a) ? b : (b != b) ? a : (b < a ? b : a); else return b < a ? b : a; }
template <class T> METAL_FUNC constexpr T max(T a, T b) { if constexpr (is_vec<T>::value) return __builtin_elementwise_max(a, b); else if constexpr (is_floating_point_v<T>) return (a != a) ? b : (b != b) ? a : (a < b ? b : a); else return a < b ? b : a; }
template <class A, class B, class = enable_if_t<!is_same_v<A, B> && is_arithmetic_v<A> && is_arithmetic_v<B>>> METAL_FUNC constexpr auto min(A a, B b) { using C = typename common2<A, B>::type; return min<C>((C)a, (C)b); }
template <class A, class B, class = enable_if_t<!is_same_v<A, B> && is_arithmetic_v<A> && is_arithmetic_v<B>>> METAL_FUNC constexpr auto max(A a, B b) { using C = typename common2<A, B>::type; return max<C>((C)a, (C)b); }
template <class T> METAL_FUNC T min3(T a, T b, T c) { return min(a, min(b, c)); } template <class T> METAL_FUNC T max3(T a, T b, T c) { return max(a, max(b, c)); }
template <class T> METAL_FUNC T fmin(T a, T b) { return min(a, b); } template <class T> METAL_FUNC T fmax(T a, T b) { return max(a, b); }
template <class T> METAL_FUNC T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }
template <class T, class A, class B, class = enable_if_t<is_arithmetic_v<T> && !(is_same_v<T, A> && is_same_v<T, B>)>> METAL_FUNC T clamp(T x, A lo, B hi) { return min(max(x, (T)lo), (T)hi); }
template <class T> METAL_FUNC T saturate(T x) { return clamp(x, (T)0, (T)1); }
template <class T> METAL_FUNC T mix(T a, T b, T t) { return a + (b - a) * t; }
template <class T> METAL_FUNC T sign(T x) { return x > (T)0 ? (T)1 : x < (T)0 ? (T)-1 : (T)0; }
template <class T> METAL_FUNC T step(T e, T x) { return x < e ? (T)0 : (T)1; }
template <class T, class = enable_if_t<is_floating_point_v<T>>> METAL_FUNC bool isnan(T x) { return x != x; }
template <class T, class = enable_if_t<is_floating_point_v<T>>> METAL_FUNC bool isinf(T x) { float f = x; return f == numeric_limits<float>::infinity() || f == -numeric_limits<float>::infinity(); }
template <class T, class = enable_if_t<is_floating_point_v<T>>> METAL_FUNC bool isfinite(T x) { return !isnan(x) && !isinf(x); }
template <class T, class = enable_if_t<is_floating_point_v<T>>> METAL_FUNC bool signbit(T x) { return as_type<uint>((float)x) >> 31; }
template <class T> METAL_FUNC T copysign(T a, T b) { return signbit(a) == signbit(b) ? a : -a; }
template <class T> METAL_FUNC T ldexp(T x, int e) { return (T)simt::simt_m2(3, (float)x, (float)e); }
template <class T> METAL_FUNC T frexp(T x, thread int& e) { if (x == 0 || !isfinite(x)) { e = 0; return x; } uint u = as_type<uint>((float)x); int sh = 0; if (!(u & 0x7f800000)) { u = as_type<uint>((float)x * 16777216.0f); sh = -24; } e = (int)((u >> 23) & 255) - 126 + sh; return (T)as_type<float>((u & 0x807fffffu) | 0x3f000000u); }
template <class T> METAL_FUNC T select(T a, T b, bool c) { return c ? b : a; }
template <class T, int N, class C> METAL_FUNC vec<T, N> select(vec<T, N> a, vec<T, N> b, C c) { vec<T, N> r; for (int i = 0; i < N; i++) r[i] = c[i] ? b[i] : a[i]; return r; }
template <class T, int N> METAL_FUNC T dot(vec<T, N> a, vec<T, N> b) { T s = a[0] * b[0]; for (int i = 1; i < N; i++) s += a[i] * b[i]; return s; }
template <class T, int N> METAL_FUNC T length(vec<T, N> a) { return sqrt(dot(a, a)); }
template <class T, int N> METAL_FUNC vec<T, N> normalize(vec<T, N> a) { return a * rsqrt(dot(a, a)); }
template <class V> METAL_FUNC bool any(V v) { bool r = false; for (int i = 0; i < is_vec<V>::n; i++) r |= !!v[i]; return r; }
template <class V> METAL_FUNC bool all(V v) { bool r = true; for (int i = 0; i < is_vec<V>::n; i++) r &= !!v[i]; return r; }
template <class T, class = enable_if_t<is_integral_v<T>>> METAL_FUNC T popcount(T x) { return (T)__builtin_popcountll((ulong)(make_unsigned_t<T>)x); }
template <class T, class = enable_if_t<is_integral_v<T>>> METAL_FUNC T clz(T x) { return x ? (T)(__builtin_clzll((ulong)(make_unsigned_t<T>)x) - (64 - 8 * (int)sizeof(T))) : (T)(8 * sizeof(T)); }
template <class T, class = enable_if_t<is_integral_v<T>>> METAL_FUNC T ctz(T x) { return x ? (T)__builtin_ctzll((ulong)x) : (T)(8 * sizeof(T)); }
METAL_FUNC uint mulhi(uint a, uint b) { return (uint)(((ulong)a * b) >> 32); } METAL_FUNC int mulhi(int a, int b) { return (int)(((long)a * b) >> 32); }
template <class T> METAL_FUNC T mul24(T a, T b) { return a * b; } template <class T> METAL_FUNC T mad24(T a, T b, T c) { return a * b + c; }
template <class T, class = enable_if_t<is_integral_v<T>>> METAL_FUNC T rotate(T v, T n) { using U = make_unsigned_t<T>; constexpr int W = 8 * sizeof(T); uint s = (uint)n & (W - 1); U u = (U)v; return (T)(s ? ((u << s) | (u >> (W - s))) : u); }
METAL_FUNC uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
template <class T, class = enable_if_t<is_integral_v<T>>> METAL_FUNC T extract_bits(T x, uint o, uint n) { if (n == 0) return 0; make_unsigned_t<T> u = (make_unsigned_t<T>)x; constexpr uint W = 8 * sizeof(T); T r = (T)(u << (W - n - o)); return (T)(r >> (W - n)); }
template <class T, class = enable_if_t<is_integral_v<T>>> METAL_FUNC T insert_bits(T b, T i, uint o, uint n) { ulong m = (n >= 64 ? ~0ul : ((1ul << n) - 1)) << o; return (T)(((ulong)b & ~m) | (((ulong)i << o) & m)); }
METAL_FUNC uint pack_half_to_uint_(half2 h) { return as_type<uint>(h); }
template <class T> METAL_FUNC T divide(T a, T b) { return a / b; }
template <class T> METAL_FUNC bool is_function_constant_defined(T) { return true; }
template <class T> using uniform = T; template <class T> METAL_FUNC constexpr T make_uniform(T x) { return x; }
template <class... B> struct _disjunction : bool_constant<(B::value || ...)> {}; template <class... B> struct _conjunction : bool_constant<(B::value && ...)> {};
// Apple intrinsic spellings used by mlx's bf16_math.h (last argument: fast/precise)
#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 0
#define SIMT_MI(N) template <class T> METAL_FUNC T __metal_##N(T x, int) { return N(x); }
SIMT_MI(fabs) SIMT_MI(acos) SIMT_MI(acosh) SIMT_MI(asin) SIMT_MI(asinh) SIMT_MI(atan) SIMT_MI(atanh) SIMT_MI(ceil) SIMT_MI(cos) SIMT_MI(cosh) SIMT_MI(cospi) SIMT_MI(exp) SIMT_MI(exp2) SIMT_MI(exp10) SIMT_MI(floor) SIMT_MI(fract) SIMT_MI(log) SIMT_MI(log2) SIMT_MI(log10) SIMT_MI(rint) SIMT_MI(round) SIMT_MI(rsqrt) SIMT_MI(sin) SIMT_MI(sinh) SIMT_MI(sinpi) SIMT_MI(sqrt) SIMT_MI(tan) SIMT_MI(tanh) SIMT_MI(trunc)
template <class T> METAL_FUNC T __metal_tanpi(T x, int) { return tan(x * (T)3.14159265358979f); }
template <class T> METAL_FUNC bool __metal_isfinite(T x, int) { return isfinite(x); } template <class T> METAL_FUNC bool __metal_isinf(T x, int) { return isinf(x); } template <class T> METAL_FUNC bool __metal_isnan(T x, int) { return isnan(x); } template <class T> METAL_FUNC bool __metal_isnormal(T x, int) { return isfinite(x); } template <class T> METAL_FUNC bool __metal_signbit(T x) { return signbit(x); } template <class T> METAL_FUNC bool __metal_signbit(T x, int) { return signbit(x); }
#define SIMT_MI2(N) template <class T> METAL_FUNC T __metal_##N(T x, T y, int) { return N(x, y); }
SIMT_MI2(fmax) SIMT_MI2(fmin) SIMT_MI2(pow) SIMT_MI2(powr) SIMT_MI2(fmod) SIMT_MI2(atan2)
template <class T> METAL_FUNC T __metal_fdim(T x, T y) { return x > y ? x - y : (T)0; } template <class T> METAL_FUNC T __metal_fma(T a, T b, T c) { return fma(a, b, c); } template <class T> METAL_FUNC T __metal_fmax3(T a, T b, T c, int) { return max(a, max(b, c)); } template <class T> METAL_FUNC T __metal_fmin3(T a, T b, T c, int) { return min(a, min(b, c)); } template <class T> METAL_FUNC T __metal_fmedian3(T a, T b, T c, int) { return max(min(a, b), min(max(a, b), c)); }
template <class T> METAL_FUNC T __metal_ldexp(T x, int e, int) { return ldexp(x, e); } template <class T> METAL_FUNC T __metal_copysign(T x, T y) { return copysign(x, y); } template <class T> METAL_FUNC T __metal_nextafter(T x, T y) { return x; } template <class T> METAL_FUNC int __metal_ilogb(T x, int) { return 0; }
template <class T> METAL_FUNC T __metal_modf(T x, thread T* i, int) { *i = trunc(x); return x - *i; } template <class T> METAL_FUNC T __metal_sincos(T x, thread T* c, int) { *c = cos(x); return sin(x); } template <class T> METAL_FUNC T __metal_frexp(T x, thread int* e, int) { return frexp(x, *e); }
template <class T> METAL_FUNC T __metal_divide(T x, T y, int) { return x / y; } template <class T> METAL_FUNC T __metal_frexp(T x, thread int* e) { return frexp(x, *e); } template <class T> METAL_FUNC T __metal_modf(T x, thread T* i) { *i = trunc(x); return x - *i; }
METAL_FUNC ushort __metal_get_simdgroup_size(ushort) { return (ushort)((const simt::GroupInfo thread*)simt::simt_group())->width; }
// ------------------------------------------------------------------ barriers
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4, mem_threadgroup_imageblock = 8, mem_object_data = 16, mem_device_and_threadgroup = 3 };
METAL_FUNC constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((uint)a | (uint)b); }
METAL_FUNC void threadgroup_barrier(mem_flags f, SIMT_SITE) { simt::simt_barrier((uint)f, simt_f, simt_l); }
METAL_FUNC void simdgroup_barrier(mem_flags f, SIMT_SITE) { simt::simt_simd_barrier((uint)f, 0, simt_f, simt_l); }
typedef ulong simd_vote_t_;
struct simd_vote { ulong v; typedef ulong vote_t; constexpr simd_vote(ulong x = 0) : v(x) {} explicit operator vote_t() const { return v; } bool all() const { return v == 0xffffffff; } bool any() const { return v != 0; } };
// ------------------------------------------------------------------ simdgroup functions
namespace sg {
using simt::Lane;
template <class T> METAL_FUNC thread T& V(Lane* l) { return *(thread T*)l->val; }
template <class Op, class T> void reduce(Lane* thread* l, int n, Lane* thread* by, int w) {
  // butterfly order over present lanes, as a log2 tree on hardware would combine them
  T v[64]; bool has[64]; for (int i = 0; i < w; i++) { has[i] = by[i] != nullptr; if (has[i]) v[i] = V<T>(by[i]); }
  int order = ((const simt::GroupInfo thread*)simt::simt_group())->order;
  if (order) { T r = V<T>(order == 1 ? l[0] : l[n - 1]); for (int i = 1; i < n; i++) r = Op::f(r, V<T>(order == 1 ? l[i] : l[n - 1 - i])); v[0] = r; }
  else for (int s = 1; s < w; s <<= 1) for (int i = 0; i + s < w; i += 2 * s) { if (has[i + s]) { v[i] = has[i] ? Op::f(v[i], v[i + s]) : v[i + s]; has[i] = true; } }
  for (int i = 0; i < n; i++) V<T>(l[i]) = v[0];
}
template <class Op, class T> void reduce_quad(Lane* thread* l, int n, Lane* thread* by, int w) {
  for (int q = 0; q < w; q += 4) { T r; bool h = false; for (int i = q; i < q + 4; i++) if (by[i]) { r = h ? Op::f(r, V<T>(by[i])) : V<T>(by[i]); h = true; } for (int i = q; i < q + 4; i++) if (by[i]) V<T>(by[i]) = r; } }
template <class Op, class T, bool INCL> void scan(Lane* thread* l, int n, Lane* thread* by, int w) {
  T acc = Op::template id<T>(); for (int i = 0; i < n; i++) { T x = V<T>(l[i]); T nx = Op::f(acc, x); V<T>(l[i]) = INCL ? nx : acc; acc = nx; } }
// arg = source lane for every lane; ~0 = keep own value
template <class T> void gather(Lane* thread* l, int n, Lane* thread* by, int w) {
  T src[64]; for (int i = 0; i < w; i++) if (by[i]) src[i] = V<T>(by[i]);
  for (int i = 0; i < n; i++) { ulong a = l[i]->arg; if (a == ~0ul) continue; if (a < (ulong)w && by[a]) V<T>(l[i]) = src[a]; else { uchar thread* p = (uchar thread*)l[i]->val; for (int k = 0; k < (int)sizeof(T); k++) p[k] = 0xFF; if (a >= (ulong)w || !by[a]) simt::simt_fail((ulong)"shuffle-inactive-lane", (ulong)"value read from a lane that does not take part", l[i]->file, l[i]->line); } } }
template <class T> void first(Lane* thread* l, int n, Lane* thread* by, int w) { T v = V<T>(l[0]); for (int i = 1; i < n; i++) V<T>(l[i]) = v; }
void inline ballot(Lane* thread* l, int n, Lane* thread* by, int w) { ulong m = 0; for (int i = 0; i < n; i++) if (l[i]->arg) m |= 1ul << l[i]->lane; for (int i = 0; i < n; i++) V<ulong>(l[i]) = m; }
struct Add { template <class T> static METAL_FUNC T f(T a, T b) { return a + b; } template <class T> static T id() { return (T)0; } };
struct Mul { template <class T> static METAL_FUNC T f(T a, T b) { return a * b; } template <class T> static T id() { return (T)1; } };
struct Min { template <class T> static METAL_FUNC T f(T a, T b) { return min(a, b); } }; struct Max { template <class T> static METAL_FUNC T f(T a, T b) { return max(a, b); } };
struct And { template <class T> static METAL_FUNC T f(T a, T b) { return a & b; } }; struct Or { template <class T> static METAL_FUNC T f(T a, T b) { return a | b; } }; struct Xor { template <class T> static METAL_FUNC T f(T a, T b) { if constexpr (is_floating_point_v<T>) return a; else return a ^ b; } };
METAL_FUNC Lane* cur() { return (Lane*)(void thread*)simt::simt_cur(); }
METAL_FUNC uint width() { return ((const simt::GroupInfo thread*)simt::simt_group())->width; }
}
#define SIMT_SGT template <class T, class = enable_if_t<is_arithmetic_v<elem_t<T>> && !is_same_v<elem_t<T>, bfloat>>>
#define SIMT_RED(NAME, OP) SIMT_SGT inline T NAME(T v, SIMT_SITE) { simt::simt_block_coll(&v, 0, 0, (ulong)&sg::reduce<sg::OP, T>, simt_f, simt_l); return v; } template <class T> METAL_FUNC T __metal_##NAME(T v, SIMT_SITE) { return NAME(v, simt_f, simt_l); }
SIMT_RED(simd_sum, Add) SIMT_RED(simd_product, Mul) SIMT_RED(simd_min, Min) SIMT_RED(simd_max, Max) SIMT_RED(simd_and, And) SIMT_RED(simd_or, Or) SIMT_RED(simd_xor, Xor)
#define SIMT_QRED(NAME, OP) SIMT_SGT inline T NAME(T v, SIMT_SITE) { simt::simt_block_coll(&v, 0, 0, (ulong)&sg::reduce_quad<sg::OP, T>, simt_f, simt_l); return v; }
SIMT_QRED(quad_sum, Add) SIMT_QRED(quad_max, Max) SIMT_QRED(quad_min, Min)
#define SIMT_SCAN(NAME, OP, INC) SIMT_SGT inline T NAME(T v, SIMT_SITE) { simt::simt_block_coll(&v, 0, 0, (ulong)&sg::scan<sg::OP, T, INC>, simt_f, simt_l); return v; } template <class T> METAL_FUNC T __metal_##NAME(T v, SIMT_SITE) { return NAME(v, simt_f, simt_l); }
SIMT_SCAN(simd_prefix_inclusive_sum, Add, true) SIMT_SCAN(simd_prefix_exclusive_sum, Add, false) SIMT_SCAN(simd_prefix_inclusive_product, Mul, true) SIMT_SCAN(simd_prefix_exclusive_product, Mul, false)
#define SIMT_SHUF(NAME, ARGT, EXPR) SIMT_SGT inline T NAME(T v, ARGT a, SIMT_SITE) { uint me = sg::cur()->lane, w = sg::width(); (void)me; (void)w; simt::simt_block_coll(&v, (ulong)(EXPR), 0, (ulong)&sg::gather<T>, simt_f, simt_l); return v; } template <class T> METAL_FUNC T __metal_##NAME(T v, ARGT a, SIMT_SITE) { return NAME(v, a, simt_f, simt_l); }
SIMT_SHUF(simd_shuffle, ushort, a) SIMT_SHUF(simd_broadcast, ushort, a) SIMT_SHUF(simd_shuffle_xor, ushort, (me ^ a))
SIMT_SHUF(simd_shuffle_up, ushort, (me >= a ? (ulong)(me - a) : ~0ul)) SIMT_SHUF(simd_shuffle_down, ushort, (me + a < w ? (ulong)(me + a) : ~0ul))
SIMT_SHUF(simd_shuffle_rotate_up, ushort, ((me + w - a % w) % w)) SIMT_SHUF(simd_shuffle_rotate_down, ushort, ((me + a) % w))
SIMT_SHUF(quad_shuffle_xor, ushort, (me ^ a)) SIMT_SHUF(quad_broadcast, ushort, ((me & ~3u) + a)) SIMT_SHUF(quad_shuffle, ushort, ((me & ~3u) + a))
SIMT_SGT inline T simd_broadcast_first(T v, SIMT_SITE) { simt::simt_block_coll(&v, 0, 0, (ulong)&sg::first<T>, simt_f, simt_l); return v; }
SIMT_SGT inline T simd_shuffle_and_fill_up(T v, T fill, ushort d, SIMT_SITE) { uint me = sg::cur()->lane; T r = v; simt::simt_block_coll(&r, me >= d ? (ulong)(me - d) : (ulong)(me + sg::width() - d), 0, (ulong)&sg::gather<T>, simt_f, simt_l); T f2 = fill; simt::simt_block_coll(&f2, me >= d ? ~0ul : (ulong)(me + sg::width() - d), 0, (ulong)&sg::gather<T>, simt_f, simt_l); return me >= d ? r : f2; }
SIMT_SGT inline T simd_shuffle_and_fill_down(T v, T fill, ushort d, SIMT_SITE) { uint me = sg::cur()->lane, w = sg::width(); T r = v; simt::simt_block_coll(&r, (me + d) % w, 0, (ulong)&sg::gather<T>, simt_f, simt_l); T f2 = fill; simt::simt_block_coll(&f2, (me + d) % w, 0, (ulong)&sg::gather<T>, simt_f, simt_l); return me + d < w ? r : f2; }
template <class T> METAL_FUNC T __metal_simd_shuffle_and_fill_up(T v, T f, ushort d, ushort, SIMT_SITE) { return simd_shuffle_and_fill_up(v, f, d, simt_f, simt_l); }
template <class T> METAL_FUNC T __metal_simd_shuffle_and_fill_down(T v, T f, ushort d, ushort, SIMT_SITE) { return simd_shuffle_and_fill_down(v, f, d, simt_f, simt_l); }
template <class T> METAL_FUNC T __metal_simd_broadcast_first(T v, SIMT_SITE) { return simd_broadcast_first(v, simt_f, simt_l); }
inline simd_vote simd_ballot(bool p, SIMT_SITE) { ulong m = 0; simt::simt_block_coll(&m, p, 0, (ulong)&sg::ballot, simt_f, simt_l); return simd_vote(m); }
inline simd_vote simd_active_threads_mask(SIMT_SITE) { return simd_ballot(true, simt_f, simt_l); }
inline bool simd_any(bool p, SIMT_SITE) { return (ulong)simd_ballot(p, simt_f, simt_l) != 0; }
inline bool simd_all(bool p, SIMT_SITE) { return (ulong)simd_ballot(!p, simt_f, simt_l) == 0; }
inline bool simd_is_first(SIMT_SITE) { ulong m = (ulong)simd_ballot(true, simt_f, simt_l); return (uint)__builtin_ctzll(m) == sg::cur()->lane; }
// ------------------------------------------------------------------ simdgroup_matrix (8x8), Apple lane layout
METAL_FUNC uint simt_fm(uint lane) { return ((lane >> 2) & 4) + ((lane >> 1) & 3); }
METAL_FUNC uint simt_fn(uint lane) { return ((lane >> 2) & 2) * 2 + (lane & 1) * 2; }
template <class T, int R, int C> struct simdgroup_matrix { typedef vec<T, 2> storage_type; storage_type e;
  simdgroup_matrix() = default; explicit simdgroup_matrix(T v) : e{v, v} { }
  thread storage_type& thread_elements() __private { return e; } const thread storage_type& thread_elements() const __private { return e; } };
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8; typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8; typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
template <class T, int R = 8, int C = 8> METAL_FUNC simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T v) { return simdgroup_matrix<T, R, C>(v); }
template <class T> METAL_FUNC void simdgroup_load_(thread simdgroup_matrix<T, 8, 8>& d, T a, T b) { d.e = vec<T, 2>{a, b}; }
#define SIMT_SGLD(AS) \
template <class T> inline void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& d, const AS T* p, ulong ld = 8, ulong2 o = ulong2{0, 0}, bool tr = false) { uint l = sg::cur()->lane, r = simt_fm(l), c = simt_fn(l); for (int i = 0; i < 2; i++) { ulong rr = tr ? c + i : r, cc = tr ? r : c + i; d.e[i] = p[(o.y + rr) * ld + o.x + cc]; } } \
template <class T> inline void simdgroup_store(simdgroup_matrix<T, 8, 8> s, AS T* p, ulong ld = 8, ulong2 o = ulong2{0, 0}, bool tr = false) { uint l = sg::cur()->lane, r = simt_fm(l), c = simt_fn(l); for (int i = 0; i < 2; i++) { ulong rr = tr ? c + i : r, cc = tr ? r : c + i; p[(o.y + rr) * ld + o.x + cc] = s.e[i]; } }
SIMT_SGLD(device) SIMT_SGLD(threadgroup)
namespace sg {
template <class D, class A, class B, class C> struct MM { thread simdgroup_matrix<D, 8, 8>* d; simdgroup_matrix<A, 8, 8> a; simdgroup_matrix<B, 8, 8> b; simdgroup_matrix<C, 8, 8> c; };
template <class D, class A, class B, class C> void mma(Lane* thread* l, int n, Lane* thread* by, int w) {
  typedef MM<D, A, B, C> M; float a[8][8], b[8][8], c[8][8];
  for (int i = 0; i < 32; i++) { if (!by[i]) continue; thread M& m = V<M>(by[i]); uint r = simt_fm(i), q = simt_fn(i); for (int k = 0; k < 2; k++) { a[r][q + k] = m.a.e[k]; b[r][q + k] = m.b.e[k]; c[r][q + k] = m.c.e[k]; } }
  for (int i = 0; i < 32; i++) { if (!by[i]) continue; thread M& m = V<M>(by[i]); uint r = simt_fm(i), q = simt_fn(i); for (int k = 0; k < 2; k++) { float s = c[r][q + k]; for (int j = 0; j < 8; j++) s = __builtin_elementwise_fma(a[r][j], b[j][q + k], s); m.d->e[k] = (D)s; } } }
}
template <class D, class A, class B, class C> inline void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c, SIMT_SITE) { sg::MM<D, A, B, C> m; m.d = &d; m.a = a; m.b = b; m.c = c; simt::simt_block_coll(&m, 0, 0, (ulong)&sg::mma<D, A, B, C>, simt_f, simt_l); }
template <class D, class A, class B> inline void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b, SIMT_SITE) { simdgroup_matrix<D, 8, 8> z((D)0); simdgroup_multiply_accumulate(d, a, b, z, simt_f, simt_l); }
// ------------------------------------------------------------------ atomics
enum memory_order { memory_order_relaxed = 0, memory_order_acquire = 2, memory_order_release = 3, memory_order_acq_rel = 4, memory_order_seq_cst = 5 };
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };
template <class T> struct atomic { T v; };
typedef atomic<int> atomic_int; typedef atomic<uint> atomic_uint; typedef atomic<float> atomic_float; typedef atomic<bool> atomic_bool;
METAL_FUNC void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device) {}
namespace sg { template <class T, class F> METAL_FUNC T rmw(ulong p, F f) { using U = conditional_t<sizeof(T) == 4, uint, ulong>; simt::simt_note_atomic(p, sizeof(T), 1, 0); thread U* q = (thread U*)p; U o = __atomic_load_n(q, 5); for (;;) { U n = __builtin_bit_cast(U, (T)f(__builtin_bit_cast(T, o))); if (__atomic_compare_exchange_n(q, &o, n, false, 5, 5)) return __builtin_bit_cast(T, o); } } }
#define SIMT_AT(NAME, EXPR) template <class T, class M> inline T NAME(volatile device atomic<T>* p, M m_, memory_order) { T m = (T)m_; return sg::rmw<T>((ulong)p, [=](T o) { return (T)(EXPR); }); } template <class T, class M> inline T NAME(volatile threadgroup atomic<T>* p, M m_, memory_order) { T m = (T)m_; return sg::rmw<T>((ulong)p, [=](T o) { return (T)(EXPR); }); }
SIMT_AT(atomic_fetch_add_explicit, o + m) SIMT_AT(atomic_fetch_sub_explicit, o - m) SIMT_AT(atomic_fetch_max_explicit, o < m ? m : o) SIMT_AT(atomic_fetch_min_explicit, m < o ? m : o) SIMT_AT(atomic_fetch_or_explicit, o | m) SIMT_AT(atomic_fetch_and_explicit, o & m) SIMT_AT(atomic_fetch_xor_explicit, o ^ m) SIMT_AT(atomic_exchange_explicit, m)
#define SIMT_AL(AS) template <class T> inline T atomic_load_explicit(const volatile AS atomic<T>* p, memory_order) { simt::simt_note_atomic((ulong)p, sizeof(T), 0, 0); return *(const volatile thread T*)(ulong)p; } template <class T, class M> inline void atomic_store_explicit(volatile AS atomic<T>* p, M v, memory_order) { simt::simt_note_atomic((ulong)p, sizeof(T), 1, 0); *(volatile thread T*)(ulong)p = (T)v; } \
template <class T> inline bool atomic_compare_exchange_weak_explicit(volatile AS atomic<T>* p, thread T* e, T d, memory_order, memory_order) { bool ok = false; T ex = *e; T old = sg::rmw<T>((ulong)p, [&](T o) { ok = __builtin_bit_cast(uint, o) == __builtin_bit_cast(uint, ex); return ok ? d : o; }); *e = old; return ok; }
SIMT_AL(device) SIMT_AL(threadgroup)
struct os_log { constexpr os_log(const constant char*, const constant char*) {} constexpr os_log(const constant char*, const constant char*) __constant {} template <class... A> void log_debug(const constant char*, A...) const __constant {} template <class... A> void log_debug(const constant char*, A...) const {} template <class... A> void log(const constant char*, A...) const {} };
}
// ------------------------------------------------------------------ builtin inputs, convertible to the declared type
namespace simt {
using namespace metal;
struct Tid3 { U3 v; template <class T, class = enable_if_t<is_integral_v<elem_t<T>>>> operator T() const { if constexpr (is_vec<T>::value) { T r; r[0] = v.x; r[1] = v.y; if constexpr (is_vec<T>::n == 3) r[2] = v.z; return r; } else return (T)v.x; } };
struct Tid1 { uint v; template <class T, class = enable_if_t<is_integral_v<T>>> operator T() const { return (T)v; } };
METAL_FUNC Lane* L() { return (Lane*)(void thread*)simt_cur(); } METAL_FUNC const GroupInfo thread* G() { return (const GroupInfo thread*)simt_group(); }
METAL_FUNC Tid3 thread_position_in_threadgroup() { return Tid3{L()->tid}; } METAL_FUNC Tid3 threadgroup_position_in_grid() { return Tid3{G()->gid}; }
METAL_FUNC Tid3 thread_position_in_grid() { U3 t = L()->tid; const GroupInfo thread* g = G(); return Tid3{{g->gid.x * g->gsize_nominal.x + t.x, g->gid.y * g->gsize_nominal.y + t.y, g->gid.z * g->gsize_nominal.z + t.z}}; }
METAL_FUNC Tid3 threads_per_threadgroup() { return Tid3{G()->gsize}; } METAL_FUNC Tid3 dispatch_threads_per_threadgroup() { return Tid3{G()->gsize_nominal}; } METAL_FUNC Tid3 threadgroups_per_grid() { return Tid3{G()->ngroups}; } METAL_FUNC Tid3 threads_per_grid() { return Tid3{G()->grid}; } METAL_FUNC Tid3 grid_size() { return Tid3{G()->grid}; } METAL_FUNC Tid3 grid_origin() { return Tid3{{0, 0, 0}}; }
METAL_FUNC Tid1 thread_index_in_threadgroup() { return Tid1{L()->lin}; } METAL_FUNC Tid1 thread_index_in_simdgroup() { return Tid1{L()->lane}; } METAL_FUNC Tid1 simdgroup_index_in_threadgroup() { return Tid1{L()->simd}; } METAL_FUNC Tid1 simdgroups_per_threadgroup() { return Tid1{G()->nsimd}; } METAL_FUNC Tid1 threads_per_simdgroup() { return Tid1{G()->width}; } METAL_FUNC Tid1 thread_execution_width() { return Tid1{G()->width}; } METAL_FUNC Tid1 dispatch_simdgroups_per_threadgroup() { U3 n = G()->gsize_nominal; return Tid1{(n.x * n.y * n.z + G()->width - 1) / G()->width}; }
METAL_FUNC Tid1 thread_index_in_quadgroup() { return Tid1{L()->lane & 3u}; } METAL_FUNC Tid1 quadgroup_index_in_threadgroup() { return Tid1{L()->lin / 4}; } METAL_FUNC Tid1 quadgroups_per_threadgroup() { return Tid1{(G()->nthreads + 3) / 4}; } METAL_FUNC Tid1 dispatch_quadgroups_per_threadgroup() { U3 n = G()->gsize_nominal; return Tid1{(n.x * n.y * n.z + 3) / 4}; }
}
#define M_PI_F 3.14159265358979323846f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.43429448190325182765f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
#define M_PI_2_F 1.57079632679489661923f
#define M_1_PI_F 0.31830988618379067154f
#define M_E_F 2.71828182845904523536f
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define MAXHALF ((half)65504.0f)
#define MAXFLOAT 3.402823466e+38f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define INT_MAX 2147483647
#define UINT_MAX 4294967295u
#define HALF_MAX 65504.0h
