// What becomes of a row on its way to codes and back. A simdgroup holds it in registers, lane l the columns l, l + 32,
// ..: the order in which csrc/cpu/kv_encode.h adds, so that codes and scales have its bits.
#include "kv_page.metal"

namespace hm {

// H in place on a row, not scaled, neighbours first.
template <int N>
METAL_FUNC void walsh_hadamard(thread float* v, uint lane) {
  for (uint h = 1; h < 32; h *= 2) {
    for (int i = 0; i < N; i++) {
      const float other = simd_shuffle_xor(v[i], ushort(h));
      v[i] = lane & h ? other - v[i] : v[i] + other;
    }
  }
  for (int h = 1; h < N; h *= 2) {
    for (int i = 0; i < N; i++) {
      if (i & h) continue;
      const float a = v[i], b = v[i + h];
      v[i] = a + b;
      v[i + h] = a - b;
    }
  }
}
// Sum of a row in one order, the same in every lane.
template <int N>
METAL_FUNC float row_sum(const thread float* v) {
  float sum = v[0];
  for (int i = 1; i < N; i++) sum += v[i];
  for (uint h = 16; h > 0; h /= 2) sum += simd_shuffle_xor(sum, ushort(h));
  return sum;
}
// The largest size of a row's numbers; NaN where there is one (after a transform: in all).
template <int N>
METAL_FUNC float row_most(const thread float* v) {
  float most = 0.0f;
  for (int i = 0; i < N; i++) most = fabs(v[i]) <= most ? most : fabs(v[i]);
  for (uint h = 16; h > 0; h /= 2) {
    const float other = simd_shuffle_xor(most, ushort(h));
    most = other <= most ? most : other;
  }
  return most;
}
METAL_FUNC int to_level(float x) {
  x = x < 127.0f ? x : 127.0f;
  return int(rint(x > -127.0f ? x : -127.0f));
}

}  // namespace hm
