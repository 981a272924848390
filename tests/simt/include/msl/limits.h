// <metal_limits> and the constants of <metal_math>.
#pragma once
namespace metal {
template <class T> struct numeric_limits;
#define SIMT_LIMITS(T, LOW, HIGH)                                                   \
  template <> struct numeric_limits<T> {                                            \
    static constexpr T min() { return LOW; }                                        \
    static constexpr T max() { return HIGH; }                                       \
    static constexpr T lowest() { return LOW; }                                     \
    static constexpr __constant bool is_signed = LOW < 0;                           \
    static constexpr __constant int digits = 8 * sizeof(T) - (LOW < 0);             \
  };
SIMT_LIMITS(bool, false, true)
SIMT_LIMITS(char, -128, 127)
SIMT_LIMITS(signed char, -128, 127)
SIMT_LIMITS(uchar, 0, 255)
SIMT_LIMITS(short, -32768, 32767)
SIMT_LIMITS(ushort, 0, 65535)
SIMT_LIMITS(int, (-2147483647 - 1), 2147483647)
SIMT_LIMITS(uint, 0, 4294967295u)
SIMT_LIMITS(long, (-9223372036854775807l - 1), 9223372036854775807l)
SIMT_LIMITS(ulong, 0, 18446744073709551615ul)
#undef SIMT_LIMITS
#define SIMT_LIMITS(T, BITS, MAX, MIN, EPSILON, INF, QUIET_NAN)                     \
  template <> struct numeric_limits<T> {                                            \
    static constexpr T of(BITS bits) { return __builtin_bit_cast(T, bits); }        \
    static constexpr T max() { return of(MAX); }                                    \
    static constexpr T lowest() { return -of(MAX); }                                \
    static constexpr T min() { return of(MIN); }                                    \
    static constexpr T epsilon() { return of(EPSILON); }                            \
    static constexpr T infinity() { return of(INF); }                               \
    static constexpr T quiet_NaN() { return of(QUIET_NAN); }                        \
  };
SIMT_LIMITS(float, uint, 0x7f7fffffu, 0x00800000u, 0x34000000u, 0x7f800000u, 0x7fc00000u)
SIMT_LIMITS(half, ushort, 0x7bff, 0x0400, 0x1400, 0x7c00, 0x7e00)
SIMT_LIMITS(bfloat, ushort, 0x7f7f, 0x0080, 0x3c00, 0x7f80, 0x7fc0)
#undef SIMT_LIMITS
}  // namespace metal

#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_1_PI_F 0.31830988618379067154f
#define M_E_F 2.71828182845904523536f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.43429448190325182765f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.70710678118654752440f
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define MAXFLOAT 3.402823466e+38f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define MAXHALF ((half)65504.0f)
#define HALF_MAX ((half)65504.0f)
#define INT_MIN (-2147483647 - 1)
#define INT_MAX 2147483647
#define UINT_MAX 4294967295u
#define SHRT_MAX 32767
#define USHRT_MAX 65535
#define CHAR_MAX 127
#define UCHAR_MAX 255
