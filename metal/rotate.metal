// What a weight's input goes through first: RMSNorm, then the Hadamard rotation, in threadgroup memory.
#include "place.metal"

namespace hm {

// 1 / rms(x) of x[0..K).
template <int K, int THREADS, class X>
METAL_FUNC float inverse_rms(X x, float eps, threadgroup float* partial, Place at) {
  float sum = 0.0f;
  for (uint i = at.index; i < K; i += THREADS) {
    const float v = float(x[i]);
    sum = fma(v, v, sum);
  }
  return 1.0f / precise::sqrt(group_sum(sum, partial, THREADS / 32, at) / float(K) + eps);
}

// H in place on y[0..SIZE), natural order, not scaled: a + b and a - b, the distance doubling, so that
// every sum has the bits of any other code with this order.
template <int SIZE, int FROM, int THREADS>
METAL_FUNC void butterflies(threadgroup float* y, uint blocks, Place at) {
  for (uint h = FROM; h < SIZE; h *= 2) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = at.index; i < blocks * (SIZE / 2); i += THREADS) {
      const uint low = (i / h) * 2 * h + i % h;
      const float a = y[low], b = y[low + h];
      y[low] = a + b, y[low + h] = a - b;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

constexpr int top_power(int p) {
  int size = 1;
  while (2 * size <= p) size *= 2;
  return size;
}

// y[0..P) = H * y in blocks of BLOCK, or, BLOCK 0, in P's powers of two, largest first.
template <int P, int BLOCK, int THREADS>
METAL_FUNC void transform(threadgroup float* y, Place at) {
  if constexpr (BLOCK > 0) {
    butterflies<BLOCK, 1, THREADS>(y, P / BLOCK, at);
  } else if constexpr (P > 0) {
    butterflies<top_power(P), 1, THREADS>(y, 1, at);
    transform<P - top_power(P), 0, THREADS>(y + top_power(P), at);
  }
}

// Number i of P after `transform`, made orthonormal. TQ divides by sqrt(block), JANGTQ multiplies by the inverse.
template <int P, int BLOCK>
METAL_FUNC float orthonormal(float v, uint i) {
  uint size = BLOCK;
  for (uint end = 0, rest = P; BLOCK == 0 && end <= i; rest -= size) {
    size = 1;
    while (2 * size <= rest) size *= 2;
    end += size;
  }
  uint half_log = 0;  // size = 4^half_log, twice that where it is no square
  while ((4u << 2 * half_log) <= size) half_log++;
  const bool square = (1u << 2 * half_log) == size;
  const float root = float(1u << half_log);
  if constexpr (BLOCK > 0) return v / (root * (square ? 1.0f : 1.41421356237309504880f));
  return v * ((square ? 1.0f : 0.70710678118654752440f) / root);
}

// y[0..P) = post * H(pre * x[0..K)), x times gamma / rms(x) first where NORM. eps: bits of a float.
template <int K, int P, int BLOCK, int THREADS, class X>
METAL_FUNC void rotate(X x, float inverse, const device float* gamma, const device float* pre, uint pres,
                       const device float* post, uint posts, threadgroup float* y, Place at) {
  for (uint i = at.index; i < P; i += THREADS) {
    float v = i < K ? float(x[i]) : 0.0f;
    if (gamma) v = i < K ? v * inverse * gamma[i] : 0.0f;
    y[i] = pre ? v * pre[i % pres] : v;
  }
  transform<P, BLOCK, THREADS>(y, at);
  for (uint i = at.index; i < P; i += THREADS) {
    const float v = orthonormal<P, BLOCK>(y[i], i);
    y[i] = post ? v * post[i % posts] : v;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

}  // namespace hm
