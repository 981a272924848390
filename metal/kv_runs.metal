// Attention of one token over coded pages, up to what a run of 8 pages gives: a group has a sequence, a key head, up to 8
// of its query heads, and reads the pages once. A simdgroup scores a page, then a thread adds up columns of values.
// Meaning: kv_ops.kv_attend; kv_join.metal joins the parts. Included behind the functions of the pages' codecs.

namespace hm {

METAL_FUNC float4 simd_most(float4 v) { return float4(simd_max(v.x), simd_max(v.y), simd_max(v.z), simd_max(v.w)); }
METAL_FUNC float4 simd_total(float4 v) { return float4(simd_sum(v.x), simd_sum(v.y), simd_sum(v.z), simd_sum(v.w)); }

// Where page p of a sequence and a key head is: p - SKIP of its m, or of a pool where the table [b, m] says.
template <int KV, int SKIP, class B>
METAL_FUNC ulong page_at(B table, uint m, uint b, uint g, uint p) {
  if (table) return ulong(table[b * m + p - SKIP]) * KV + g;
  return ulong(b * KV + g) * m + p - SKIP;
}

// x [b, KV, HEADS, D], factors [b, KV, HEADS]: queries (attention.metal); pages [b, KV, m, words] or, with a table,
// [places, KV, words]; lengths: tokens of each sequence; dims: m, runs. Out: parts [b, KV, runs, HEADS, D], sums (most,
// total, noise, 0) alike.
// A group has R of HEADS query heads; runs are 8 pages, counted from page 0. EACH: columns of a thread. KEY, VALUE: 32 times
// a codec's number plus the bits of a code; book: centroids of keys, then of values.
template <int KEY, int VALUE, int KV, int HEADS, int R, int D, int SKIP, int KEY_WORDS, int VALUE_WORDS, int WORTH,
          int EACH, class X, class F, class B, class L, class M>
METAL_FUNC void kv_runs(const device X* x, F factors, const device uchar* key_pages, const device uchar* value_pages,
                        B table, const device float* book, L lengths, M dims, device float* parts, device float* sums,
                        threadgroup float4* shared, threadgroup float4* peaks, threadgroup float4* totals,
                        threadgroup float4* noises, threadgroup float4* units, Place at) {
  constexpr int V = (R + 3) / 4;
  const uint g = at.group.y / (HEADS / R), head = at.group.y % (HEADS / R) * R, b = at.group.z, seq = b * KV + g;
  const uint own = (lengths[b] - 1) / PAGE, run = 8 * at.group.x, p = run + at.simd;
  if (run >= own || own < 2) return;
  const bool seen = p > 0 && p < own;
  const ulong mine = seen ? page_at<KV, SKIP>(table, dims[0], b, g, p) : 0;
  const ulong part = (ulong(seq) * dims[1] + at.group.x) * HEADS + head;
  const device uint* values = (const device uint*)value_pages;

  const uint first = seq * HEADS + head;
  for (uint i = at.index; i < 4 * V * D; i += 256)
    ((threadgroup float*)shared)[i % D * 4 * V + i / D] = i < R * D ? float(x[ulong(first) * D + i]) : 0.0f;
  if (at.index < 4 * V) ((threadgroup float*)units)[at.index] = at.index < R ? factors[first + at.index] : 0.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float4 s[2 * V], unit[V], noise[V];
  for (int i = 0; i < 2 * V; i++) s[i] = -INFINITY;
  if (seen) key_scores<KEY, D, V>((const device uint*)key_pages + mine * KEY_WORDS, book, shared, units, s, at.lane);
  for (int v = 0; v < V; v++) {
    const float4 most = simd_most(max(s[v], s[V + v]));
    if (at.lane == 0) peaks[at.simd * V + v] = most;
    unit[v] = 0.0f, noise[v] = 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int v = 0; v < V; v++) {
    float4 most = peaks[v];
    for (int i = 1; i < 8; i++) most = max(most, peaks[i * V + v]);
    s[v] = precise::exp(s[v] - most), s[V + v] = precise::exp(s[V + v] - most);
    const float4 total = simd_total(s[v] + s[V + v]);
    if (at.lane == 0) totals[at.simd * V + v] = total;
  }
  if (seen) weigh<VALUE, D, V, WORTH>(values + mine * VALUE_WORDS, s, unit, noise, at.lane);
  for (int v = 0; v < V && at.lane == 0; v++) units[at.simd * V + v] = unit[v], noises[at.simd * V + v] = noise[v];

  float4 o[EACH * V];
  for (int i = 0; i < EACH * V; i++) o[i] = 0.0f;
  for (uint four = 0; four < 8; four += 4) {  // weights of 4 pages at a time
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = 0; i < 2 * V && at.simd / 4 * 4 == four; i++)
      shared[((at.simd % 4 * 2 + i / V) * 32 + at.lane) * V + i % V] = s[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = four; i < four + 4; i++) {
      if (run + i == 0 || run + i >= own) continue;
      const ulong place = page_at<KV, SKIP>(table, dims[0], b, g, run + i);
      page_values<VALUE, D, V>(values + place * VALUE_WORDS, book + 16, shared + i % 4 * PAGE * V, units + i * V, o, at);
    }
  }
  for (int e = 0; e < EACH; e++) {
    const uint c = column_of<VALUE>(e, at);
    for (int r = 0; r < R && c < D; r++) parts[(part + r) * D + c] = o[e * V + r / 4][r % 4];
  }
  if (at.index < R) {
    const uint v = at.index / 4, i = at.index % 4;
    float4 end(-INFINITY, 0.0f, 0.0f, 0.0f);
    for (int k = 0; k < 8; k++) {
      end.x = max(end.x, peaks[k * V + v][i]);
      end.y += totals[k * V + v][i];
      end.z += noises[k * V + v][i];
    }
    ((device float4*)sums)[part + at.index] = end;
  }
}

}  // namespace hm
