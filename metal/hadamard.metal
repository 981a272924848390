// post * H(pre * x), a threadgroup per row. Meaning: reference.hadamard, bit for bit.
#include "weight.metal"
#include "rotate.metal"

namespace hm {

template <int K, int P, int BLOCK, int PRES, int POSTS, int THREADS, class T>
METAL_FUNC void hadamard(const device T* x, const device float* pre, const device float* post, device T* y,
                         threadgroup float* row, Place at) {
  rotate<K, P, BLOCK, THREADS>(x + ulong(at.group.x) * K, 1.0f, nullptr, pre, PRES, post, POSTS, row, at);
  for (uint i = at.index; i < P; i += THREADS) y[ulong(at.group.x) * P + i] = T(row[i]);
}

}  // namespace hm
