// Eight numbers of a row at a time, from device memory and from where a rotated row lies.
#include "place.metal"

#define UNROLL _Pragma("clang loop unroll(full)")
#define EACH(i, n) UNROLL for (int i = 0; i < n; i++)

namespace hm {

// v[0..8) = p[i..i + 8), 0 from LIMIT on; i is a multiple of 8.
template <int LIMIT, class T>
METAL_FUNC void load_eight(const device T* p, uint i, thread float* v) {
  if constexpr (LIMIT % 8 == 0) {
    const float4 a = float4(*(const device vec<T, 4>*)(p + i)), b = float4(*(const device vec<T, 4>*)(p + i + 4));
    EACH(j, 4) v[j] = a[j], v[j + 4] = b[j];
  } else {
    EACH(j, 8) v[j] = i + j < uint(LIMIT) ? float(p[i + j]) : 0.0f;
  }
}

// Where number i of a rotated row lies in threadgroup memory. Lanes that read 4 numbers, 8 to 64 apart, meet different banks.
constexpr uint padded(uint k) { return (k + 31) / 32 * 32; }  // what it needs for a row
METAL_FUNC uint slot(uint i) { return i ^ ((i >> 5 ^ i >> 8) & 7u) << 2; }

// v[0..8) = y[i..i + 8).
METAL_FUNC void turned_eight(const threadgroup float* y, uint i, thread float* v) {
  const float4 a = *(const threadgroup float4*)(y + slot(i)), b = *(const threadgroup float4*)(y + slot(i + 4));
  EACH(j, 4) v[j] = a[j], v[j + 4] = b[j];
}

}  // namespace hm
