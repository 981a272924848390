// The integers behind the scores of our codecs, by themselves, so that backends can be held to each other. Meaning:
// kv_ops.kv_scores. A group has up to 8 rows and 8 pages, a simdgroup one page.
#include "kv_keys.metal"
#include "kv_query.metal"

namespace hm {

template <int BITS, int D, int ROWS, int PAGES, int ROOT, class T>
METAL_FUNC void kv_scores(const device T* q, const device uchar* pages, const device float* signs, device int8_t* q8,
                          device float* unit, device int* scores, threadgroup float4* x, Place at) {
  constexpr int N = D / 32;
  const uint row = 8 * at.group.y, p = 8 * at.group.x + at.simd, r = row + at.simd;
  const bool first = at.group.x == 0 && r < ROWS;
  float v[N];
  for (int i = 0; i < N; i++) v[i] = r < ROWS ? float(q[ulong(r) * D + at.lane + 32 * i]) : 0.0f;
  const float one = query_row<N>(v, signs, as_type<float>(ROOT), at.lane);
  if (at.lane == 0 && first) unit[r] = one;
  for (int i = 0; i < N; i++) {
    const uint c = at.lane + 32 * i;
    ((threadgroup float*)x)[8 * c + at.simd] = v[i];
    if (first) q8[ulong(r) * D + c] = int8_t(v[i]);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (p >= PAGES) return;
  float4 sums[4];
  const device uint* page = (const device uint*)pages + ulong(p) * (PAGE * D * BITS / 32 + PAGE / 2);
  page_sums<BITS, D, 2>(page, x, sums, at.lane);
  for (uint i = 0; i < 8 && row + i < ROWS; i++) {
    device int* to = scores + ulong(row + i) * PAGES * PAGE + p * PAGE + at.lane;
    to[0] = int(sums[i / 4][i % 4]);
    to[32] = int(sums[2 + i / 4][i % 4]);
  }
}

}  // namespace hm
