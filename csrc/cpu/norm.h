// RMSNorm of rows, in f32: y = x / sqrt(mean(x^2) + eps) * gamma, gamma used as it is (transformers' 1 + w).
#pragma once

namespace hm {
namespace {

// Four chains: a quarter of the wait, and of the rounding.
inline float sum_of_squares(const float* x, int64_t n) {
  Vec part[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) part[j] = fma(load(x + i + j * kLanes), load(x + i + j * kLanes), part[j]);
  Vec total = add(add(part[0], part[1]), add(part[2], part[3]));
  for (; i + kLanes <= n; i += kLanes) total = fma(load(x + i), load(x + i), total);
  if (i < n) {
    const Vec v = load_n(x + i, int(n - i));
    total = fma(v, v, total);
  }
  return sum(total);
}

// y may be x.
inline void normalise(const float* x, const float* gamma, float* y, int64_t n, float eps) {
  const Vec inverse = splat(1.0f / sqrtf(sum_of_squares(x, n) / float(n) + eps));
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, mul(mul(load(x + i), inverse), load(gamma + i)));
  if (const int left = int(n - i))
    store_n(y + i, mul(mul(load_n(x + i, left), inverse), load_n(gamma + i, left)), left);
}

void norm_rows(const NormTask& t, int64_t begin, int64_t end) {
  const int64_t bytes = t.x_dtype == hm_f32 ? 4 : 2;
  for (int64_t r = begin; r < end; ++r) {
    float* y = t.y + r * t.columns;
    widen(static_cast<const char*>(t.x) + r * t.columns * bytes, y, t.columns, Dtype(t.x_dtype));
    normalise(y, t.gamma, y, t.columns, t.eps);
  }
}

}  // namespace
}  // namespace hm
