// y = post * H(pre * x): the orthonormal Walsh-Hadamard transform of each block of a row, natural
// (Sylvester) order. TQ and TQ-derived files arrive with fixed blocks of 128, JANGTQ with one block
// per power of two in k.
//
// Where the time goes: a row of 2048 is 8 KB in, 8 KB out and 11 additions an element. Everything
// between the first load and the last store stays in a buffer in cache; a pass over it does as many
// stages as registers allow:
//
//   load*pre | stages inside a vector, then between 8 or 16 vectors | 3 stages a pass ... | scale*post
//
// Stages run in the order of their distance 1, 2, 4, ... and each is one add or subtract, so every
// ISA returns the same bits. A fixed block is divided by f32(sqrt(n)) (bit-equal to TQ's files), a
// power of two of k is multiplied by f32(1/sqrt(n)) (bit-equal to JANGTQ's and to mx.hadamard_transform).
#pragma once

namespace hm {
namespace {

constexpr int64_t kLargestBlock = 16384;

#if HM_ISA_AVX512 || HM_ISA_NEON
constexpr int kTile = 16;  // vectors kept in registers, of 32
#else
constexpr int kTile = 8;  // of 16
#endif

// -1 in the lanes that receive a difference, for distances 1, 2, 4, 8.
alignas(64) const float kDifference[4][16] = {
    {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
    {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
    {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
    {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1},
};

// All stages between lanes of one vector. The product by +-1 is exact: fma is a plain add here.
inline Vec butterflies(Vec v) {
  v = fma(v, load(kDifference[0]), swap_lanes<1>(v));
  v = fma(v, load(kDifference[1]), swap_lanes<2>(v));
  if constexpr (kLanes > 4) v = fma(v, load(kDifference[2]), swap_lanes<4>(v));
  if constexpr (kLanes > 8) v = fma(v, load(kDifference[3]), swap_lanes<8>(v));
  return v;
}

// Stages at distances 1, 2, ... V/2 between V vectors.
template <int V, int H = 1>
inline void butterflies(Vec (&v)[V]) {
  if constexpr (H < V) {
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i)
      if (!(i & H)) {
        Vec a = v[i], b = v[i + H];
        v[i] = add(a, b);
        v[i + H] = sub(a, b);
      }
    butterflies<V, 2 * H>(v);
  }
}

template <int V>
inline void first_stages(float* x, int64_t n) {
  for (int64_t o = 0; o < n; o += V * kLanes) {
    Vec v[V];
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) v[i] = butterflies(load(x + o + i * kLanes));
    butterflies(v);
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) store(x + o + i * kLanes, v[i]);
  }
}

// Stages at distances h, 2h, ... V/2 h.
template <int V>
inline void far_stages(float* x, int64_t n, int64_t h) {
  for (int64_t o = 0; o < n; o += V * h)
    for (int64_t j = o; j < o + h; j += kLanes) {
      Vec v[V];
#pragma GCC unroll 16
      for (int i = 0; i < V; ++i) v[i] = load(x + j + i * h);
      butterflies(v);
#pragma GCC unroll 16
      for (int i = 0; i < V; ++i) store(x + j + i * h, v[i]);
    }
}

// Unscaled transform of x f32[n] in place, n a power of two.
inline void walsh_hadamard(float* x, int64_t n) {
  if (n < kLanes) {
    for (int64_t h = 1; h < n; h *= 2)
      for (int64_t i = 0; i < n; ++i)
        if (!(i & h)) {
          float a = x[i], b = x[i + h];
          x[i] = a + b;
          x[i + h] = a - b;
        }
    return;
  }
  int64_t h = kTile * kLanes;
  if (n >= h) {
    first_stages<kTile>(x, n);
  } else {
    h = n;
    switch (n / kLanes) {
      case 8: first_stages<8>(x, n); break;
      case 4: first_stages<4>(x, n); break;
      case 2: first_stages<2>(x, n); break;
      default: first_stages<1>(x, n);
    }
  }
  for (; h * 8 <= n; h *= 8) far_stages<8>(x, n, h);
  if (h * 4 == n) far_stages<4>(x, n, h);
  if (h * 2 == n) far_stages<2>(x, n, h);
}

// y[i] = x[i] * by[i], or x[i]; x may be y.
inline void times(const float* x, const float* by, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, mul(load(x + i), load(by + i)));
  for (; i < n; ++i) y[i] = x[i] * by[i];
}

// y = x / divisor or x * factor for n numbers; x may be y.
inline void scaled(const float* x, float* y, int64_t n, bool divide) {
  const double root = sqrt(double(n));
  const float by = divide ? float(root) : float(1.0 / root);
  int64_t i = 0;
  if (divide)
    for (; i + kLanes <= n; i += kLanes) store(y + i, div(load(x + i), splat(by)));
  else
    for (; i + kLanes <= n; i += kLanes) store(y + i, mul(load(x + i), splat(by)));
  for (; i < n; ++i) y[i] = divide ? x[i] / by : x[i] * by;
}

// One block of n columns starting at column o of a row: columns from k on read as zero.
inline void hadamard_block(const HadamardTask& t, int64_t row, int64_t o, int64_t n) {
  alignas(64) float v[kLargestBlock];
  const char* x = static_cast<const char*>(t.x) + (row * t.k + o) * (t.x_dtype == hm_f32 ? 4 : 2);
  char* y = static_cast<char*>(t.y) + (row * t.columns + o) * (t.y_dtype == hm_f32 ? 4 : 2);
  const int64_t stored = t.k - o < n ? t.k - o : n;
  const float *pre = t.pre ? t.pre + o % t.pre_period : nullptr, *post = t.post ? t.post + o % t.post_period : nullptr;

  if (pre && t.x_dtype == hm_f32 && stored == n && n >= kLanes) {
    times(reinterpret_cast<const float*>(x), pre, v, n);
  } else {
    widen(x, v, stored, Dtype(t.x_dtype));
    if (stored < n) memset(v + stored, 0, size_t(n - stored) * 4);
    if (pre) times(v, pre, v, n);
  }

  walsh_hadamard(v, n);

  float* out = t.y_dtype == hm_f32 && n >= kLanes ? reinterpret_cast<float*>(y) : v;
  scaled(v, out, n, t.block != 0);
  if (post) times(out, post, out, n);
  if (out == v) narrow(v, y, n, Dtype(t.y_dtype));
}

// Units: blocks of rows when the block is fixed, whole rows otherwise.
void hadamard(const HadamardTask& t, int64_t begin, int64_t end) {
  if (t.block) {
    const int64_t blocks = t.columns / t.block;
    for (int64_t u = begin; u < end; ++u) hadamard_block(t, u / blocks, u % blocks * t.block, t.block);
    return;
  }
  for (int64_t row = begin; row < end; ++row)
    for (int64_t o = 0, n = kLargestBlock; n; n /= 2)
      if (t.k & n) {
        hadamard_block(t, row, o, n);
        o += n;
      }
}

}  // namespace
}  // namespace hm
