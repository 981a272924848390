// What is between the projections of attention and its cache: RMSNorm and positions of queries and keys, a warp each head
// of a token. Meaning: the first half of reference.attention.
#pragma once
#include "kv_codec.cuh"
#include "kv_row.cuh"

namespace hm {

// cos and sin of an angle of any size, rounded almost as well as cosf and sinf, which keep a stack for large ones. Polynomials:
// Cephes (S. L. Moshier), sinf.c, for angles up to pi / 4.
struct Turn {
  float cosine, sine;
  __device__ explicit Turn(float angle) {
    const double quarters = rint(double(angle) * 0.63661977236758134308);
    const float x = float(fma(quarters, -1.57079632679489661923, double(angle))), z = x * x;
    const float s = fmaf(fmaf(fmaf(-1.9515295891e-4f, z, 8.3321608736e-3f), z, -1.6666654611e-1f) * z, x, x);
    const float c = fmaf(fmaf(fmaf(2.443315711809948e-5f, z, -1.388731625493765e-3f), z, 4.166664568298827e-2f) * z, z,
                         fmaf(-0.5f, z, 1.0f));
    const int turns = int(quarters) & 3;
    cosine = turns % 2 ? s : c, sine = turns % 2 ? c : s;
    if (turns == 1 || turns == 2) cosine = -cosine;
    if (turns >= 2) sine = -sine;
  }
};

// A head in registers, normed and turned. Pairs are (i, i + rot / 2); `row` is the warp's own D floats of shared memory.
template <int N>
__device__ inline void turn_head(float* v, const float* norm, const float* freqs, int rot, float position, float eps,
                                 float stretch, float* row) {
  const int lane = int(lane_index()), half = rot / 2;
  if (norm) {
    float squares = 0.0f;
    EACH(i, N) squares = fmaf(v[i], v[i], squares);
    const float mean = __fdiv_rn(warp_sum(squares), float(32 * N)), inverse = __fdiv_rn(1.0f, __fsqrt_rn(mean + eps));
    EACH(i, N) v[i] = v[i] * inverse * norm[lane + 32 * i];
  }
  if (!rot) return;
  EACH(i, N) row[lane + 32 * i] = v[i];
  __syncwarp();
  EACH(i, N) {
    const int c = lane + 32 * i;
    if (c >= rot) continue;
    const bool low = c < half;
    const Turn turn(__fmul_rn(position, freqs[low ? c : c - half]));
    const float other = row[low ? c + half : c - half];
    v[i] = v[i] * (turn.cosine * stretch) + (low ? -other : other) * (turn.sine * stretch);
  }
}

// proj [b, t, (2 heads + 2 groups) D]: query and gate of each head, keys, values; offsets [b]: positions of the first
// tokens. Out: q [b, heads, t, D]; kv [2, b, groups, t, D] or, with `placed`, the raw rows of a cache
// [2, b, groups, 192, D], each token where it belongs; for a cache with codes (coded) x [b, heads, t, D], queries as scores of
// coded pages take them, and factors [b, heads, t]. x: of our codecs (coded 2) whole numbers as bytes, of others floats,
// turned where keys are. worth: what a level is worth of a row's scale, or fp8's scale. Shared: a row of D floats a warp.
template <int D>
struct attention {
  static constexpr int THREADS = 128, N = D / 32;

  // The last row of queries of coded pages: whole numbers, or floats.
  static __device__ void code_query(float* v, const float* signs, int ours, float worth, void* x, float* factors, size_t row) {
    float factor = worth * root_of(D);
    const uint lane = lane_index();
    if (ours) {
      factor = query_row<N>(v, signs, root_of(D)) * factor;
      EACH(i, N) static_cast<signed char*>(x)[row * D + lane + 32 * i] = (signed char)(v[i]);
    } else {
      if (signs) {
        EACH(i, N) v[i] *= signs[lane + 32 * i];
        walsh_hadamard<N>(v);
        EACH(i, N) v[i] *= root_of(D);
      }
      EACH(i, N) static_cast<float*>(x)[row * D + lane + 32 * i] = v[i];
    }
    if (lane == 0) factors[row] = factor;
  }

  static __device__ void run(const void* proj, const float* q_norm, const float* k_norm, const float* freqs,
                             const float* signs, const int* offsets, void* q, void* kv, void* x, float* factors, int batch,
                             int tokens, int heads, int groups, int rot, float eps, float stretch, int placed, int coded,
                             float worth, int proj_dtype, int q_dtype, int kv_dtype) {
    const uint each = heads + 2 * groups, unit = blockIdx.x * (THREADS / 32) + warp_index(), token = unit / each;
    const int head = int(unit % each), lane = int(lane_index());
    wait_for_previous();
    if (token >= uint(batch * tokens)) return;
    const uint b = token / tokens, i = token % tokens;
    const size_t from = (size_t(token) * (each + heads) + (head < heads ? 2 * head : heads + head)) * D + lane;
    const uint position = uint(offsets[b]) + i;
    float v[N];
    EACH(c, N) v[c] = load_number(proj, from + 32 * c, proj_dtype);
    if (head < heads + groups)
      turn_head<N>(v, head < heads ? q_norm : k_norm, freqs, rot, float(position), eps, stretch,
                   shared_memory<float>() + warp_index() * D);
    if (head >= heads) {
      const uint side = head >= heads + groups, g = head - heads - side * groups, p = position / PAGE;
      const size_t seq = (size_t(side) * batch + b) * groups + g;
      const size_t row = placed ? (seq * 3 + raw_slot(p)) * PAGE + position % PAGE : seq * tokens + i;
      EACH(c, N) store_number(kv, row * D + lane + 32 * c, kv_dtype, v[c]);
      return;
    }
    const size_t row = (size_t(b) * heads + head) * tokens + i;
    EACH(c, N) store_number(q, row * D + lane + 32 * c, q_dtype, v[c]);
    if (coded) code_query(v, signs, coded == 2, worth, x, factors, row);
  }
};

}  // namespace hm
