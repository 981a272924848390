// Queries as codes of ours are multiplied with them.
#include "kv_row.metal"

namespace hm {

// A row turned as keys are (signs are +-1) and made whole numbers up to 127, in floats; returns their unit, the same in
// every lane.
template <int N>
METAL_FUNC float query_row(thread float* v, const device float* signs, float root, uint lane) {
  for (int i = 0; i < N; i++) v[i] *= signs[lane + 32 * i];
  walsh_hadamard<N>(v, lane);
  for (int i = 0; i < N; i++) v[i] *= root;
  const float most = row_most<N>(v), unit = most > 0.0f ? most / 127.0f : 1.0f;
  for (int i = 0; i < N; i++) v[i] = float(to_level(v[i] / unit));
  return unit;
}

}  // namespace hm
