// Conversions between storage dtypes and f32, bit-exact and portable. No library calls: the ISA
// translation units include this file and may not pull in weak symbols.
#pragma once
#include <stdint.h>
#include <string.h>

namespace hm {

static inline float bits_to_f32(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline uint32_t f32_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

static inline float bf16_to_f32(uint16_t h) { return bits_to_f32(uint32_t(h) << 16); }

// Round to nearest even; NaN stays NaN.
static inline uint16_t f32_to_bf16(float f) {
  uint32_t u = f32_to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t(u >> 16 | 0x40);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static inline float f16_to_f32(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, mag = h & 0x7fff;
  if (mag >= 0x7c00) return bits_to_f32(sign | 0x7f800000u | (mag & 0x3ff) << 13);
  if (mag >= 0x0400) return bits_to_f32(sign | ((mag << 13) + (112u << 23)));
  return bits_to_f32(sign | f32_to_bits(float(mag) * 0x1p-24f));  // subnormals are exact in f32
}

// Round to nearest even, overflow to infinity.
static inline uint16_t f32_to_f16(float f) {
  uint32_t u = f32_to_bits(f), sign = u >> 16 & 0x8000, mag = u & 0x7fffffff;
  if (mag > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (mag >= 0x477ff000u) return uint16_t(sign | 0x7c00);
  if (mag < 0x38800000u) {  // subnormal: adding 0.5 aligns the last kept bit with 2^-24
    float r = bits_to_f32(mag) + 0.5f;
    return uint16_t(sign | (f32_to_bits(r) - 0x3f000000u));
  }
  mag += 0xfff + (mag >> 13 & 1);
  return uint16_t(sign | (mag - (112u << 23)) >> 13);
}

// 2^(s-127); byte 0 is the subnormal 2^-127, byte 255 is NaN.
static inline float e8m0_to_f32(uint8_t s) {
  if (s == 0) return bits_to_f32(0x00400000u);
  if (s == 255) return bits_to_f32(0x7fc00000u);
  return bits_to_f32(uint32_t(s) << 23);
}

// E2M1 numbers, doubled so that they are integers.
static const int8_t e2m1_doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

}  // namespace hm
