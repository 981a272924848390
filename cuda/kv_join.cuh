// The end of attention of one token: parts of coded pages joined, what codes add to their sum taken out (Wiener), rotation
// undone; then the parts of raw pages; the gate. A block has a query head. Meaning: kv_ops.kv_attend.
#pragma once
#include "kv_runs.cuh"

namespace hm {

// parts, sums, lengths, more: of kv_runs, `slots` parts a head; gate: a row of `width` numbers per sequence, head h's from
// (2 h + 1) D on, or null; noise: of the values' codec, turned: whether it turns rows. Out: y [b, heads D]. Blocks: (query
// heads, b). Shared: (256 / (D / 4) D + PARTS + 4) floats.
template <int D>
struct kv_join {
  static constexpr int THREADS = 256, N = D / 32, LANES = D / 4, ROWS = THREADS / LANES;

  // A head's sum over ROWS partial sums, as its columns lane, lane + 32, .. of the one warp that goes on.
  static __device__ void columns(const float* rows, float* v) {
    EACH(i, N) {
      v[i] = 0.0f;
      EACH(r, ROWS) v[i] += rows[r * D + lane_index() + 32 * i];
    }
  }
  static __device__ void uncode(float* v, float noise, float spread, const float* signs) {
    if (noise > 0.0f) {
      float squares[N];
      EACH(i, N) squares[i] = __fmul_rn(v[i], v[i]);
      const float all = row_sum<N>(squares), kept = all > 0.0f ? 1.0f - __fdiv_rn(noise * spread, all) : 0.0f;
      EACH(i, N) v[i] *= fmaxf(kept, 0.0f);
    }
    if (!signs) return;
    walsh_hadamard<N>(v);
    EACH(i, N) v[i] = v[i] * root_of(D) * signs[lane_index() + 32 * i];
  }

  static __device__ void run(const float* parts, const float* sums, const float* signs, const void* gate, const int* lengths,
                             void* y, int groups, int heads, int slots, int more, int width, float noise, int gate_dtype,
                             int y_dtype) {
    float *rows = shared_memory<float>(), *by = rows + ROWS * D;
    const uint h = blockIdx.x, b = blockIdx.y, lane = lane_index();
    wait_for_previous();
    const uint own = (lengths[b] + more - 1) / PAGE, count = coded_parts(own);
    const size_t head = size_t(b) * groups * heads + h;
    const size_t first = (size_t(b) * groups + h / heads) * slots * heads + h % heads;
    const float4* raw = reinterpret_cast<const float4*>(sums) + first;
    const float4* coded = raw + RAW_PARTS * heads;
    float most = -infinity(), total = 0.0f, spread = 0.0f;
    if (threadIdx.x < 32) {
      for (uint i = lane; i < count; i += 32) most = fmaxf(most, coded[i * heads].x);
      most = warp_max(most);
      for (uint i = lane; i < count; i += 32) {
        const float4 part = coded[i * heads];
        const float weight = expf(part.x - most);
        by[i] = weight;
        total = fmaf(part.y, weight, total), spread = fmaf(part.z * weight, weight, spread);
      }
      total = warp_sum(total), spread = warp_sum(spread);
    }
    __syncthreads();
    const uint column = threadIdx.x % LANES * 4;
    float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
    for (uint i = threadIdx.x / LANES; i < count; i += ROWS) {
      const float4 p = *reinterpret_cast<const float4*>(parts + (first + size_t(RAW_PARTS + i) * heads) * D + column);
      o.x = fmaf(p.x, by[i], o.x), o.y = fmaf(p.y, by[i], o.y), o.z = fmaf(p.z, by[i], o.z), o.w = fmaf(p.w, by[i], o.w);
    }
    *reinterpret_cast<float4*>(rows + threadIdx.x / LANES * D + column) = o;
    __syncthreads();
    if (threadIdx.x >= 32) return;

    float v[N];
    columns(rows, v);
    if (count) uncode(v, noise, spread, signs);
    const float4 ends[2] = {own ? raw[0] : make_float4(-infinity(), 0.0f, 0.0f, 0.0f), raw[heads]};
    const float peak = fmaxf(most, fmaxf(ends[0].x, ends[1].x)), coded_by = count ? expf(most - peak) : 0.0f;
    float all = total * coded_by;
    EACH(i, N) v[i] *= coded_by;
    EACH(e, 2) {
      if (e == 0 && !own) continue;
      const float weight = expf(ends[e].x - peak);
      all = fmaf(ends[e].y, weight, all);
      EACH(i, N) v[i] = fmaf(parts[(first + size_t(e) * heads) * D + lane + 32 * i], weight, v[i]);
    }
    EACH(i, N) {
      const uint c = lane + 32 * i;
      float sum = __fdiv_rn(v[i], all);
      if (gate) {
        const float open = load_number(gate, size_t(b) * width + (2 * h + 1) * D + c, gate_dtype);
        sum = __fdiv_rn(sum, 1.0f + expf(-open));
      }
      store_number(y, head * D + c, y_dtype, sum);
    }
  }
};

}  // namespace hm
