// __half and __nv_bfloat16: 16 bits each, one rounding after every operation.
#pragma once
#include "types.h"
#include "warp.h"

namespace simt_cuda {
inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, digits = h & 1023;
  if (exponent == 31) return bits<float>(sign | 0x7f800000u | digits << 13);
  if (exponent == 0) return bits<float>(sign | bits<uint32_t>(float(digits) * 0x1p-24f));
  return bits<float>(sign | (exponent + 112) << 23 | digits << 13);
}
inline uint16_t float_to_half(float f) {
  const uint32_t u = bits<uint32_t>(f), sign = u >> 16 & 0x8000, size = u & 0x7fffffff;
  if (size > 0x7f800000) return 0x7fff;
  if (size >= 0x477ff000) return sign | 0x7c00;
  if (size < 0x38800000)  // a denormal, in units of 2^-24
    return sign | uint32_t(nearbyint(double(bits<float>(size)) * 0x1p24));
  const uint32_t rounded = size + 0xfff + (size >> 13 & 1);
  return sign | ((rounded >> 13) - (112 << 10));
}
inline float bfloat_to_float(uint16_t b) { return bits<float>(uint32_t(b) << 16); }
inline uint16_t float_to_bfloat(float f) {
  const uint32_t u = bits<uint32_t>(f);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

// a * b + c cut to 24 bits, the last one set when anything was lost: rounding that to 16 bits is
// one rounding of the exact number.
inline float fused(float a, float b, float c) {
  const double product = double(a) * b, sum = product + c;  // the product is exact
  if (!std::isfinite(sum)) return float(sum);
  const double back = sum - product, lost = (product - (sum - back)) + (c - back);
  uint64_t u = bits<uint64_t>(sum);
  if (lost != 0 && !(u & 1)) u += (lost > 0) == (sum > 0) ? 1 : -1;
  const uint64_t tail = u & ((1ull << 29) - 1);
  return float(bits<double>((u - tail) | (tail ? 1ull << 29 : 0)));
}

template <float decode(uint16_t), uint16_t encode(float)> struct alignas(2) Float16 {
  uint16_t x;
  Float16() = default;
  Float16(float f) : x(encode(f)) {}
  Float16(double f) : x(encode(float(f))) {}
  Float16(int i) : x(encode(float(i))) {}
  Float16(unsigned i) : x(encode(float(i))) {}
  static Float16 of_bits(uint16_t u) {
    Float16 r;
    r.x = u;
    return r;
  }
  operator float() const { return decode(x); }
  Float16 operator-() const { return of_bits(x ^ 0x8000); }
  Float16& operator+=(Float16 o) { return *this = *this + o; }
  Float16& operator-=(Float16 o) { return *this = *this - o; }
  Float16& operator*=(Float16 o) { return *this = *this * o; }
  Float16& operator/=(Float16 o) { return *this = *this / o; }
  friend Float16 operator+(Float16 a, Float16 b) { return float(a) + float(b); }
  friend Float16 operator-(Float16 a, Float16 b) { return float(a) - float(b); }
  friend Float16 operator*(Float16 a, Float16 b) { return float(a) * float(b); }
  friend Float16 operator/(Float16 a, Float16 b) { return float(a) / float(b); }
  friend bool operator<(Float16 a, Float16 b) { return float(a) < float(b); }
  friend bool operator>(Float16 a, Float16 b) { return float(a) > float(b); }
  friend bool operator<=(Float16 a, Float16 b) { return float(a) <= float(b); }
  friend bool operator>=(Float16 a, Float16 b) { return float(a) >= float(b); }
  friend bool operator==(Float16 a, Float16 b) { return float(a) == float(b); }
  friend bool operator!=(Float16 a, Float16 b) { return float(a) != float(b); }
};
template <class T> struct alignas(4) Pair16 {
  T x, y;
  friend Pair16 operator+(Pair16 a, Pair16 b) { return {a.x + b.x, a.y + b.y}; }
  friend Pair16 operator-(Pair16 a, Pair16 b) { return {a.x - b.x, a.y - b.y}; }
  friend Pair16 operator*(Pair16 a, Pair16 b) { return {a.x * b.x, a.y * b.y}; }
};
}  // namespace simt_cuda

using __half = simt_cuda::Float16<simt_cuda::half_to_float, simt_cuda::float_to_half>;
using __nv_bfloat16 = simt_cuda::Float16<simt_cuda::bfloat_to_float, simt_cuda::float_to_bfloat>;
using __half2 = simt_cuda::Pair16<__half>;
using __nv_bfloat162 = simt_cuda::Pair16<__nv_bfloat16>;
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

// Operations of both types, alone and in pairs.
#define SIMT_FLOAT16(T, T2)                                                                   \
  inline T __hadd(T a, T b) { return a + b; }                                                 \
  inline T __hsub(T a, T b) { return a - b; }                                                 \
  inline T __hmul(T a, T b) { return a * b; }                                                 \
  inline T __hdiv(T a, T b) { return a / b; }                                                 \
  inline T __hneg(T a) { return -a; }                                                         \
  inline T __habs(T a) { return T::of_bits(a.x & 0x7fff); }                                   \
  inline T __hmax(T a, T b) { return a < b ? b : a; }                                         \
  inline T __hmin(T a, T b) { return b < a ? b : a; }                                         \
  inline bool __hlt(T a, T b) { return a < b; }                                               \
  inline bool __hgt(T a, T b) { return a > b; }                                               \
  inline bool __heq(T a, T b) { return a == b; }                                              \
  inline T __hfma(T a, T b, T c) { return simt_cuda::fused(a, b, c); }                        \
  inline T2 __hadd2(T2 a, T2 b) { return a + b; }                                             \
  inline T2 __hsub2(T2 a, T2 b) { return a - b; }                                             \
  inline T2 __hmul2(T2 a, T2 b) { return a * b; }                                             \
  inline T2 __hneg2(T2 a) { return {-a.x, -a.y}; }                                            \
  inline T2 __habs2(T2 a) { return {__habs(a.x), __habs(a.y)}; }                              \
  inline T2 __hmax2(T2 a, T2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }              \
  inline T2 __hmin2(T2 a, T2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }              \
  inline T2 __hfma2(T2 a, T2 b, T2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; } \
  inline float __low2float(T2 a) { return a.x; }                                              \
  inline float __high2float(T2 a) { return a.y; }
SIMT_FLOAT16(__half, __half2)
SIMT_FLOAT16(__nv_bfloat16, __nv_bfloat162)
#undef SIMT_FLOAT16

inline float __half2float(__half h) { return h; }
inline __half __float2half(float f) { return f; }
inline __half __float2half_rn(float f) { return f; }
inline __half __int2half_rn(int i) { return float(i); }
inline __half2 __float22half2_rn(float2 f) { return {f.x, f.y}; }
inline __half2 __floats2half2_rn(float a, float b) { return {a, b}; }
inline __half2 __float2half2_rn(float a) { return {a, a}; }
inline float2 __half22float2(__half2 h) { return {h.x, h.y}; }
inline __half2 __half2half2(__half a) { return {a, a}; }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half2 make_half2(__half a, __half b) { return {a, b}; }
inline __half __low2half(__half2 a) { return a.x; }
inline __half __high2half(__half2 a) { return a.y; }
inline unsigned short __half_as_ushort(__half h) { return h.x; }
inline __half __ushort_as_half(unsigned short u) { return __half::of_bits(u); }

inline float __bfloat162float(__nv_bfloat16 b) { return b; }
inline __nv_bfloat16 __float2bfloat16(float f) { return f; }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return f; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 f) { return {f.x, f.y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {a, b}; }
inline float2 __bfloat1622float2(__nv_bfloat162 b) { return {b.x, b.y}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 a) { return {a, a}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 a) { return a.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 a) { return a.y; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.x; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) { return __nv_bfloat16::of_bits(u); }
