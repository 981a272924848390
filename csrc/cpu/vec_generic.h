// Vectors as arrays: portable C++, left to the compiler's vectoriser. Meanings in vec.h.
#pragma once

namespace hm {
namespace {

constexpr int kLanes = 8;
struct Vec {
  float f[kLanes];
};

template <class F>
inline Vec each(F f) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v.f[i] = f(i);
  return v;
}
inline Vec zero() { return Vec{}; }
inline Vec splat(float s) { return each([&](int) { return s; }); }
inline Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
inline Vec add(Vec a, Vec b) { return each([&](int i) { return a.f[i] + b.f[i]; }); }
inline Vec sub(Vec a, Vec b) { return each([&](int i) { return a.f[i] - b.f[i]; }); }
inline Vec mul(Vec a, Vec b) { return each([&](int i) { return a.f[i] * b.f[i]; }); }
inline Vec div(Vec a, Vec b) { return each([&](int i) { return a.f[i] / b.f[i]; }); }
inline Vec fma(Vec a, Vec b, Vec c) { return each([&](int i) { return a.f[i] * b.f[i] + c.f[i]; }); }
inline Vec max_(Vec a, Vec b) { return each([&](int i) { return a.f[i] > b.f[i] ? a.f[i] : b.f[i]; }); }
inline Vec abs_(Vec a) { return each([&](int i) { return a.f[i] < 0 ? -a.f[i] : a.f[i]; }); }
inline float sum(Vec v) {
  for (int h = kLanes / 2; h; h /= 2)
    for (int i = 0; i < h; ++i) v.f[i] += v.f[i + h];
  return v.f[0];
}
inline float max_of(Vec v) {
  for (int i = 1; i < kLanes; ++i) v.f[0] = v.f[i] > v.f[0] ? v.f[i] : v.f[0];
  return v.f[0];
}
inline Vec round_(Vec a) { return each([&](int i) { return rintf(a.f[i]); }); }
inline Vec scale_pow2(Vec p, Vec n, Vec x) {
  return each([&](int i) {
    if (x.f[i] != x.f[i]) return x.f[i];
    if (x.f[i] < -87.33654f) return 0.0f;
    if (x.f[i] > 88.72283f) return bits_to_f32(0x7f800000u);
    int e = int(n.f[i]), half = e / 2;  // two steps: 2^128 is not a float
    return p.f[i] * bits_to_f32(uint32_t(half + 127) << 23) * bits_to_f32(uint32_t(e - half + 127) << 23);
  });
}
template <int H>
inline Vec swap_lanes(Vec v) {
  return each([&](int i) { return v.f[i ^ H]; });
}
inline Vec from_u8(const uint8_t* p) { return each([&](int i) { return float(p[i]); }); }
inline Vec load_bf16(const uint16_t* p) {
  uint16_t h[kLanes];
  memcpy(h, p, sizeof h);
  return each([&](int i) { return bf16_to_f32(h[i]); });
}
inline Vec load_f16(const uint16_t* p) {
  uint16_t h[kLanes];
  memcpy(h, p, sizeof h);
  return each([&](int i) { return f16_to_f32(h[i]); });
}
inline void store_bf16(uint16_t* p, Vec v) {
  uint16_t h[kLanes];
  for (int i = 0; i < kLanes; ++i) h[i] = f32_to_bf16(v.f[i]);
  memcpy(p, h, sizeof h);
}
inline void store_f16(uint16_t* p, Vec v) {
  uint16_t h[kLanes];
  for (int i = 0; i < kLanes; ++i) h[i] = f32_to_f16(v.f[i]);
  memcpy(p, h, sizeof h);
}
inline Vec lookup16(const float* table, const uint8_t* codes) {
  return each([&](int i) { return table[codes[i]]; });
}

}  // namespace
}  // namespace hm
