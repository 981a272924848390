// The end of attention of one token: runs of coded pages joined in order, what codes add to their sum taken out (Wiener),
// rotation undone; page 0 and the token's own page as they came; the gate. A group has a query head.
// Meaning: kv_ops.kv_attend.
#include "group_sum.metal"
#include "kv_page.metal"

namespace hm {

// Softmax of raw tokens: x[t] to weights of the largest; returns (most, total).
template <int D, int ROOT, class Q, class Raw>
METAL_FUNC float2 raw_weights(const device Q* q, const device Raw* keys, uint sinks, uint skip, uint count,
                              threadgroup float* x, Place at) {
  constexpr int N = D / 32;
  float row[N], most = -INFINITY, total = 0.0f;
  for (int i = 0; i < N; i++) row[i] = float(q[at.lane + 32 * i]) * as_type<float>(ROOT);
  for (uint t = at.simd; t < count; t += 8) {
    const device Raw* key = keys + (t < sinks ? t : t + skip) * D + at.lane;
    float sum = 0.0f;
    for (int i = 0; i < N; i++) sum = fma(row[i], float(key[32 * i]), sum);
    sum = simd_sum(sum);
    if (at.lane == 0) x[t] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint t = at.lane; t < count; t += 32) most = max(most, x[t]);
  most = simd_max(most);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (at.index < count) x[at.index] = precise::exp(x[at.index] - most);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint t = at.lane; t < count; t += 32) total += x[t];
  return float2(most, simd_sum(total));
}

// A head's sum without the noise of codes, in the basis of the values; o: columns index, index + 256, ..
template <int D, int EACH, int ROOT, int NOISE, int TURNED>
METAL_FUNC void uncode(thread float* o, float noise, const device float* signs, threadgroup float* x,
                       threadgroup float* partial, Place at) {
  if (NOISE) {
    float squares = 0.0f;
    for (uint e = 0; e < EACH; e++) squares = fma(o[e], o[e], squares);
    const float all = group_sum(squares, partial, 8, at), kept = all > 0.0f ? 1.0f - as_type<float>(NOISE) * noise / all : 0.0f;
    for (uint e = 0; e < EACH; e++) o[e] *= max(kept, 0.0f);
  }
  if (!TURNED) return;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint e = 0, c = at.index; c < D; e++, c += 256) x[c] = o[e];
  for (uint h = 1; h < D; h *= 2) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = at.index; i < D / 2; i += 256) {
      const uint low = i / h * 2 * h + i % h;
      const float a = x[low], b = x[low + h];
      x[low] = a + b, x[low + h] = a - b;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint e = 0, c = at.index; c < D; e++, c += 256) o[e] = x[c] * as_type<float>(ROOT) * signs[c];
}

// q [b, KV * HEADS, D]; raw [2, b, KV, 192, D]: page 0, then page p at row 64 (1 + p % 2); parts, sums, dims: of kv_runs;
// gate: a row of WIDTH numbers per sequence, head h's from (2 h + 1) D on, or null. Out: y [b, KV * HEADS * D].
template <int B, int KV, int HEADS, int D, int ROOT, int NOISE, int TURNED, int WIDTH, class Q, class Raw, class S, class G,
          class L, class M, class Y>
METAL_FUNC void kv_join(const device Q* q, const device Raw* raw, const device float* parts, S sums,
                        const device float* signs, const device G* gate, L lengths, M dims, device Y* y, threadgroup float* x,
                        threadgroup float* partial, Place at) {
  constexpr int EACH = (D + 255) / 256;
  const uint h = at.group.x, b = at.group.y, seq = b * KV + h / HEADS, head = b * KV * HEADS + h;
  const uint own = (lengths[b] - 1) / PAGE, sinks = own ? PAGE : 0, skip = own % 2 * PAGE;
  const uint count = sinks + lengths[b] - own * PAGE, runs = own < 2 ? 0 : (own + 7) / 8;
  const device Raw* keys = raw + ulong(seq) * 3 * PAGE * D;
  const device Raw* values = keys + ulong(B) * KV * 3 * PAGE * D;
  const float2 own_sums = raw_weights<D, ROOT>(q + ulong(head) * D, keys, sinks, skip, count, x, at);
  float o[EACH], coded[EACH], most = -INFINITY, total = 0.0f, noise = 0.0f;
  for (uint e = 0, c = at.index; e < EACH; e++, c += 256) {
    o[e] = 0.0f, coded[e] = 0.0f;
    for (uint t = 0; t < count && c < D; t++) o[e] = fma(x[t], float(values[(t < sinks ? t : t + skip) * D + c]), o[e]);
  }
  const ulong first = ulong(seq) * dims[1] * HEADS + h % HEADS;
  for (uint i = 0; i < runs; i++) most = max(most, sums[4 * (first + i * HEADS)]);
  for (uint i = 0; i < runs; i++) {
    const ulong part = first + i * HEADS;
    const float by = precise::exp(sums[4 * part] - most);
    total = fma(sums[4 * part + 1], by, total);
    noise = fma(sums[4 * part + 2] * by, by, noise);
    for (uint e = 0, c = at.index; c < D; e++, c += 256) coded[e] = fma(parts[part * D + c], by, coded[e]);
  }
  if (runs) uncode<D, EACH, ROOT, NOISE, TURNED>(coded, noise, signs, x, partial, at);
  const float peak = max(most, own_sums.x), by = precise::exp(own_sums.x - peak);
  const float coded_by = runs ? precise::exp(most - peak) : 0.0f;
  const float all = own_sums.y * by + total * coded_by;
  for (uint e = 0, c = at.index; c < D; e++, c += 256) {
    float sum = (o[e] * by + coded[e] * coded_by) / all;
    if (gate) sum = sum / (1.0f + precise::exp(-float(gate[ulong(b) * WIDTH + (2 * h + 1) * D + c])));
    y[ulong(head) * D + c] = Y(sum);
  }
}

}  // namespace hm
