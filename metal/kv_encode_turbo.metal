// Full pages of keys or values to mlx-swift-lm's codes, a simdgroup 4 tokens of one page. Meaning: kv_ops.kv_encode.
#include "kv_row.metal"
#include "kv_stream.metal"

namespace hm {

struct TwoFloats {  // a sum with the bits f64 would keep
  float high, low;
};
METAL_FUNC TwoFloats plus(TwoFloats a, TwoFloats b) {
  const float sum = a.high + b.high, part = sum - a.high;
  const float low = (a.low + b.low) + ((a.high - (sum - part)) + (b.high - part)), high = sum + low;
  return TwoFloats{high, low - (high - sum)};
}
// A row's length, rounded once: mlx-swift-lm's codes are held to sums in f64.
template <int N>
METAL_FUNC float row_length(const thread float* x) {
  const uint e = clamp(as_type<uint>(row_most<N>(x)) >> 23 & 255u, 1u, 253u);
  const float down = as_type<float>((254u - e) << 23);
  TwoFloats sum{0.0f, 0.0f};
  for (int i = 0; i < N; i++) {
    const float v = x[i] * down, square = v * v;
    sum = plus(sum, TwoFloats{square, fma(v, v, -square)});
  }
  for (uint h = 16; h > 0; h /= 2)
    sum = plus(sum, TwoFloats{simd_shuffle_xor(sum.high, ushort(h)), simd_shuffle_xor(sum.low, ushort(h))});
  const float root = precise::sqrt(sum.high);
  if (!(root > 0.0f)) return root;
  const float rest = fma(-root, root, sum.high) + sum.low, more = rest / (2.0f * root);
  return (root + more) * as_type<float>(e << 23);
}
template <int BITS, int N>
METAL_FUNC float turbo_row(thread float* x, const thread float* signs, float root, const device float* book,
                           thread uint* codes, uint lane) {
  const float n = row_length<N>(x), inverse = n > 1e-8f ? 1.0f / n : 0.0f;
  for (int i = 0; i < N; i++) x[i] *= inverse * signs[i];
  walsh_hadamard<N>(x, lane);
  for (int i = 0; i < N; i++) {
    x[i] *= root;
    codes[i] = 0;
    for (int m = 0; m + 1 < 1 << BITS; m++) codes[i] += x[i] > (book[m] + book[m + 1]) / 2.0f;
  }
  return n;
}

// Pages [p, 64, D] to [p, bytes]. book: 2^bits centroids.
template <int CODEC, int PAGES, int D, int ROOT, int THREADS, class T>
METAL_FUNC void kv_encode_turbo(const device T* rows, const device float* signs, const device float* book, device uchar* pages,
                                Place at) {
  constexpr int BITS = code_bits(CODEC), N = D / 32;
  const uint unit = at.group.x * (THREADS / 32) + at.simd, p = unit / (PAGE / 4);
  if (p >= PAGES) return;
  device uint* page = (device uint*)pages + ulong(p) * page_words(CODEC, D);
  float sign[N];
  for (int i = 0; i < N; i++) sign[i] = signs[at.lane + 32 * i];
  for (uint token = unit % (PAGE / 4) * 4, end = token + 4; token < end; token++) {
    float x[N];
    uint codes[N];
    for (int i = 0; i < N; i++) x[i] = float(rows[(ulong(p) * PAGE + token) * D + at.lane + 32 * i]);
    const float n = turbo_row<BITS, N>(x, sign, as_type<float>(ROOT), book, codes, at.lane);
    put_stream<BITS, N>(codes, page + token * N * BITS, at.lane);
    if (at.lane == 0) page[code_words(CODEC, D) + token] = as_type<uint>(n);
  }
}

}  // namespace hm
