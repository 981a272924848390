// post * H(pre * x), a threadgroup per row. Meaning: reference.hadamard, bit for bit. x may go through RMSNorm first:
// H is linear, so that 1 / rms is a factor of the result.
#include "rotate.metal"

namespace hm {

// SPAN: numbers of a threadgroup, P or what its memory holds. Groups: (rows, P / SPAN). Where a block of H is longer
// than SPAN, hadamard_join follows.
template <int K, int P, int BLOCK, int PRES, int POSTS, int SPAN, int THREADS, int EPS, class T, class Y>
METAL_FUNC void hadamard(const device T* x, const device float* gamma, const device float* pre, const device float* post,
                         device Y* y, threadgroup float* row, threadgroup float* partial, Place at) {
  const uint begin = at.group.y * SPAN;
  rotate<K, P, BLOCK, PRES, POSTS, SPAN, THREADS>(x + ulong(at.group.x) * K, gamma, pre, post, row,
                                                  gamma ? partial : nullptr, begin, at);
  float inverse = 1.0f;
  if (gamma) {
    float square = 0.0f;
    for (int s = 0; s < THREADS / 32; s++) square += partial[s];
    inverse = 1.0f / precise::sqrt(square / float(K) + as_type<float>(EPS));
  }
  for (uint i = at.index; i < SPAN && begin + i < P; i += THREADS) {
    const float v = row[slot(i)];
    y[ulong(at.group.x) * P + begin + i] = Y(gamma ? v * inverse : v);
  }
}

// The stages from SPAN on. Groups: (rows, SPAN / THREADS).
template <int P, int BLOCK, int POSTS, int SPAN, int THREADS, class Y>
METAL_FUNC void hadamard_join(const device float* pieces, const device float* post, device Y* y, Place at) {
  constexpr int count = (P + SPAN - 1) / SPAN;
  const uint j = at.group.y * THREADS + at.index;
  const ulong row = ulong(at.group.x) * P;
  float v[count];
  EACH(m, count) v[m] = j + SPAN * m < P ? pieces[row + j + SPAN * m] : 0.0f;
  far_stages<P, BLOCK, SPAN, count>(v, j);
  EACH(m, count) {
    const uint i = j + SPAN * m;
    const float n = orthonormal<P, BLOCK>(v[m], i);
    if (i < P) y[row + i] = Y(post ? n * post[i % POSTS] : n);
  }
}

}  // namespace hm
