// 4 lanes of whatever the target has, through the vector types of GCC and Clang. Meanings in vec.h.
#pragma once

namespace hm {
namespace {

constexpr int kLanes = 4;
typedef float Vec __attribute__((vector_size(4 * kLanes)));

template <class F>
inline Vec each(F f) {
  Vec v{};
  for (int i = 0; i < kLanes; ++i) v[i] = f(i);
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
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline float sum(Vec v) {
  for (int h = kLanes / 2; h; h /= 2)
    for (int i = 0; i < h; ++i) v[i] += v[i + h];
  return v[0];
}
inline Vec max_(Vec a, Vec b) { return each([&](int i) { return a[i] > b[i] ? a[i] : b[i]; }); }
inline Vec sums(const Vec* v) { return each([&](int i) { return sum(v[i]); }); }
inline Vec round_(Vec a) { return each([&](int i) { return rintf(a[i]); }); }
inline Vec scale_pow2(Vec p, Vec n, Vec x) {
  return each([&](int i) {
    if (x[i] != x[i]) return x[i];
    if (x[i] < -87.33654f) return 0.0f;
    if (x[i] > 88.72283f) return bits_to_f32(0x7f800000u);
    int e = int(n[i]), half = e / 2;  // two steps: 2^128 is not a float
    return p[i] * bits_to_f32(uint32_t(half + 127) << 23) * bits_to_f32(uint32_t(e - half + 127) << 23);
  });
}
template <int H>
inline Vec swap_lanes(Vec v) {
  return each([&](int i) { return v[i ^ H]; });
}
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
  for (int i = 0; i < kLanes; ++i) h[i] = f32_to_bf16(v[i]);
  memcpy(p, h, sizeof h);
}
inline void store_f16(uint16_t* p, Vec v) {
  uint16_t h[kLanes];
  for (int i = 0; i < kLanes; ++i) h[i] = f32_to_f16(v[i]);
  memcpy(p, h, sizeof h);
}
inline Vec lookup16(const float* table, const uint8_t* codes) {
  return each([&](int i) { return table[codes[i]]; });
}

template <int kBits, class F>
inline void each_code(const uint8_t* p, Vec* v, F f) {
  uint64_t word;
  memcpy(&word, p, 8);
  for (int h = 0; h < 8 / kLanes; ++h)
    v[h] = each([&](int i) { return f(word >> kBits * (h * kLanes + i) & ((1u << kBits) - 1)); });
}
template <int kBits>
inline void codes8(const uint8_t* p, Vec* v) {
  each_code<kBits>(p, v, [](uint64_t code) { return float(int(code)); });
}
template <int kBits>
inline void table8(const float* table, const uint8_t* p, Vec* v) {
  each_code<kBits>(p, v, [table](uint64_t code) { return table[code]; });
}

}  // namespace
}  // namespace hm
