// The integers behind the scores of our codecs, by themselves, so that backends can be held to each other. Meaning:
// kv_ops.kv_scores. A group has up to 8 rows and 8 pages, a simdgroup one page.
#include "kv_keys.metal"

namespace hm {

template <int CODEC, int D, int ROWS, int PAGES, int ROOT, class T>
METAL_FUNC void kv_scores(const device T* q, const device uchar* pages, const device float* signs, device int8_t* q8,
                          device float* unit, device int* scores, threadgroup float4* x, Place at) {
  const uint row = 8 * at.group.y, p = 8 * at.group.x + at.simd, r = row + at.simd;
  const bool real = r < ROWS;
  const float one = query_row<D, 2>(q + ulong(r) * D, real, signs, as_type<float>(ROOT), (threadgroup float*)x, at.simd, at.lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (at.group.x == 0 && real) {
    if (at.lane == 0) unit[r] = one;
    for (uint i = at.lane; i < D; i += 32) q8[ulong(r) * D + i] = int8_t(((threadgroup float*)x)[8 * i + at.simd]);
  }
  if (p >= PAGES) return;
  float4 sums[4];
  page_sums<code_bits(CODEC), D, 2>((const device uint*)pages + ulong(p) * page_words(CODEC, D), x, sums, at.lane);
  for (uint i = 0; i < 8 && row + i < ROWS; i++) {
    device int* to = scores + ulong(row + i) * PAGES * PAGE + p * PAGE + at.lane;
    to[0] = int(sums[i / 4][i % 4]);
    to[32] = int(sums[2 + i / 4][i % 4]);
  }
}

}  // namespace hm
