// <metal_type_traits>: types of types. Each address space makes a type of its own.
#pragma once
namespace metal {
template <class T, T V>
struct integral_constant {
  static constexpr __constant T value = V;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return V; }
  constexpr T operator()() const { return V; }
};
template <bool B> using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;

template <bool B, class T, class F> struct conditional { using type = T; };
template <class T, class F> struct conditional<false, T, F> { using type = F; };
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;

template <class A, class B> struct is_same : false_type {};
template <class A> struct is_same<A, A> : true_type {};
template <class A, class B> constexpr __constant bool is_same_v = is_same<A, B>::value;

template <class T> struct remove_const { using type = T; };
template <class T> struct remove_const<const T> { using type = T; };
template <class T> struct remove_volatile { using type = T; };
template <class T> struct remove_volatile<volatile T> { using type = T; };
template <class T> struct remove_cv {
  using type = typename remove_const<typename remove_volatile<T>::type>::type;
};
template <class T> using remove_const_t = typename remove_const<T>::type;
template <class T> using remove_cv_t = typename remove_cv<T>::type;

template <class T> struct remove_addrspace { using type = T; };
template <class T> struct remove_addrspace<__global T> { using type = T; };
template <class T> struct remove_addrspace<__local T> { using type = T; };
template <class T> struct remove_addrspace<__private T> { using type = T; };
template <class T> struct remove_addrspace<__constant T> { using type = T; };
template <class T> using remove_addrspace_t = typename remove_addrspace<T>::type;

template <class T> struct remove_reference { using type = T; };
template <class T> struct remove_reference<__private T&> { using type = T; };
template <class T> struct remove_reference<__global T&> { using type = T; };
template <class T> struct remove_reference<__local T&> { using type = T; };
template <class T> struct remove_reference<__constant T&> { using type = T; };
template <class T> struct remove_reference<T&&> { using type = T; };
template <class T> using remove_reference_t = typename remove_reference<T>::type;
template <class T> using decay_t = remove_cv_t<remove_reference_t<T>>;

template <class T> struct is_integral : false_type {};
template <class T> struct is_floating_point : false_type {};
template <class T> struct simt_signed : false_type {};
#define SIMT_INTEGER(T, SIGNED)                     \
  template <> struct is_integral<T> : true_type {}; \
  template <> struct simt_signed<T> : bool_constant<SIGNED> {};
SIMT_INTEGER(bool, false)
SIMT_INTEGER(char, true)
SIMT_INTEGER(signed char, true)
SIMT_INTEGER(uchar, false)
SIMT_INTEGER(short, true)
SIMT_INTEGER(ushort, false)
SIMT_INTEGER(int, true)
SIMT_INTEGER(uint, false)
SIMT_INTEGER(long, true)
SIMT_INTEGER(ulong, false)
#undef SIMT_INTEGER
template <> struct is_floating_point<float> : true_type {};
template <> struct is_floating_point<half> : true_type {};
template <> struct is_floating_point<bfloat> : true_type {};

template <class T> constexpr __constant bool is_integral_v = is_integral<remove_cv_t<T>>::value;
template <class T>
constexpr __constant bool is_floating_point_v = is_floating_point<remove_cv_t<T>>::value;
template <class T>
constexpr __constant bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <class T> struct is_arithmetic : bool_constant<is_arithmetic_v<T>> {};
template <class T>
constexpr __constant bool is_signed_v = simt_signed<T>::value || is_floating_point_v<T>;
template <class T> constexpr __constant bool is_unsigned_v = is_integral_v<T> && !is_signed_v<T>;
template <class T> struct is_signed : bool_constant<is_signed_v<T>> {};
template <class T> struct is_unsigned : bool_constant<is_unsigned_v<T>> {};

template <class F, class T> constexpr __constant bool is_convertible_v = __is_convertible_to(F, T);
template <class F, class T> struct is_convertible : bool_constant<__is_convertible_to(F, T)> {};
template <class F, class T> constexpr __constant bool is_constructible_v = __is_constructible(F, T);

template <class T> struct make_unsigned { using type = T; };
template <> struct make_unsigned<char> { using type = uchar; };
template <> struct make_unsigned<signed char> { using type = uchar; };
template <> struct make_unsigned<short> { using type = ushort; };
template <> struct make_unsigned<int> { using type = uint; };
template <> struct make_unsigned<long> { using type = ulong; };
template <class T> using make_unsigned_t = typename make_unsigned<T>::type;
template <class T> struct make_signed { using type = T; };
template <> struct make_signed<uchar> { using type = char; };
template <> struct make_signed<ushort> { using type = short; };
template <> struct make_signed<uint> { using type = int; };
template <> struct make_signed<ulong> { using type = long; };
template <class T> using make_signed_t = typename make_signed<T>::type;

template <class... B> struct _disjunction : bool_constant<(B::value || ...)> {};
template <class... B> struct _conjunction : bool_constant<(B::value && ...)> {};
template <class T> T&& declval();

// Vectors are T or T1 .. T4 with components of one type.
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
template <class T>
struct is_vec : false_type {
  using elem = T;
  static constexpr __constant int n = 1;
};
template <class T, int N>
struct is_vec<T __attribute__((ext_vector_type(N)))> : true_type {
  using elem = T;
  static constexpr __constant int n = N;
};
template <class T> constexpr __constant bool is_vec_v = is_vec<T>::value;
template <class T> using elem_t = typename is_vec<T>::elem;
template <class T>
constexpr __constant bool is_fp_ = is_same_v<elem_t<T>, float> || is_same_v<elem_t<T>, half>;
template <class T> constexpr __constant bool is_int_ = is_integral_v<elem_t<T>>;
}  // namespace metal
