// <metal_integer>. A vector's result is element by element. Builtins are those of long: OpenCL's long
// long has 128 bits.
#pragma once
namespace metal {
#define SIMT_SCALAR template <class T, class = enable_if_t<is_integral_v<T>>> METAL_FUNC
#define SIMT_EACH(NAME)                                  \
  template <class T, int N>                              \
  METAL_FUNC vec<T, N> NAME(vec<T, N> x) {               \
    for (int i = 0; i < N; i++) x[i] = NAME((T)x[i]);    \
    return x;                                            \
  }

SIMT_SCALAR T popcount(T x) { return (T)__builtin_popcountl((ulong)(make_unsigned_t<T>)x); }
SIMT_EACH(popcount)
SIMT_SCALAR T clz(T x) {
  constexpr int bits = 8 * sizeof(T);
  return x ? (T)(__builtin_clzl((ulong)(make_unsigned_t<T>)x) - (64 - bits)) : (T)bits;
}
SIMT_EACH(clz)
SIMT_SCALAR T ctz(T x) { return x ? (T)__builtin_ctzl((ulong)x) : (T)(8 * sizeof(T)); }
SIMT_EACH(ctz)
SIMT_SCALAR T reverse_bits(T x) {
  return (T)(__builtin_bitreverse64((ulong)(make_unsigned_t<T>)x) >> (64 - 8 * sizeof(T)));
}
SIMT_EACH(reverse_bits)

SIMT_SCALAR T rotate(T x, T by) {
  using U = make_unsigned_t<T>;
  constexpr int bits = 8 * sizeof(T);
  uint n = (uint)by & (bits - 1);
  U u = (U)x;
  return (T)(n ? (U)(u << n) | (U)(u >> (bits - n)) : u);
}
template <class T, int N>
METAL_FUNC vec<T, N> rotate(vec<T, N> x, vec<T, N> by) {
  for (int i = 0; i < N; i++) x[i] = rotate((T)x[i], (T)by[i]);
  return x;
}

SIMT_SCALAR T extract_bits(T x, uint offset, uint n) {
  if (n == 0) return 0;
  constexpr uint bits = 8 * sizeof(T);
  T top = (T)((make_unsigned_t<T>)x << (bits - n - offset));
  return (T)(top >> (bits - n));  // a signed number extends its sign
}
template <class T, int N>
METAL_FUNC vec<T, N> extract_bits(vec<T, N> x, uint offset, uint n) {
  for (int i = 0; i < N; i++) x[i] = extract_bits((T)x[i], offset, n);
  return x;
}
SIMT_SCALAR T insert_bits(T base, T x, uint offset, uint n) {
  ulong mask = (n >= 64 ? ~0ul : (1ul << n) - 1) << offset;
  return (T)(((ulong)base & ~mask) | (((ulong)x << offset) & mask));
}

METAL_FUNC uint mulhi(uint a, uint b) { return (uint)(((ulong)a * b) >> 32); }
METAL_FUNC int mulhi(int a, int b) { return (int)(((long)a * b) >> 32); }
METAL_FUNC ulong mulhi(ulong a, ulong b) { return (ulong)(((unsigned __int128)a * b) >> 64); }
template <class T> METAL_FUNC T madhi(T a, T b, T c) { return mulhi(a, b) + c; }
template <class T> METAL_FUNC T mul24(T a, T b) { return a * b; }
template <class T> METAL_FUNC T mad24(T a, T b, T c) { return a * b + c; }
SIMT_SCALAR T absdiff(T a, T b) { return a < b ? b - a : a - b; }
SIMT_SCALAR T addsat(T a, T b) {
  T r;
  if (!__builtin_add_overflow(a, b, &r)) return r;
  return b < 0 ? numeric_limits<T>::min() : numeric_limits<T>::max();
}
SIMT_SCALAR T subsat(T a, T b) {
  T r;
  if (!__builtin_sub_overflow(a, b, &r)) return r;
  return is_signed_v<T> && b < 0 ? numeric_limits<T>::max() : numeric_limits<T>::min();
}
SIMT_SCALAR T hadd(T a, T b) { return (T)((a & b) + ((a ^ b) >> 1)); }
SIMT_SCALAR T rhadd(T a, T b) { return (T)((a | b) - ((a ^ b) >> 1)); }
#undef SIMT_EACH
#undef SIMT_SCALAR
}  // namespace metal
