// y = residual + rotate(norm(x)) W^T for a few tokens: a block reads its codes once for four of them, more would leave no
// registers. What x goes through, every block does again for itself: it costs less than a launch.
#pragma once
#include "rows.cuh"

namespace hm {

// A token on its way into shared memory: RMSNorm and rotation.
struct Input {
  const void* x;  // [t, r.columns], of dtype
  const float* gamma;  // [r.columns], or null: no norm
  int dtype;
  float eps;
  Rotation r;  // for parts that want it; wide is 0 where x has been through it
};

// Token `row` of the input into place `token` of T, for a part of this kind. 1 / rms is left to whoever takes the
// results: shared_at<float>(at.inverse)[token]. Ends with a barrier.
template <int T>
__device__ inline void lay_input(const Input& in, const Places& at, uint kind, uint columns, int token, size_t row) {
  const size_t begin = row * in.r.columns;
  float square = 0.0f, *turned = shared_at<float>(at.turned);
  if (is_rotated(kind) && in.r.wide) {
    square = rotate<16>(in.r, in.x, begin, in.dtype, in.gamma, turned, 0, in.r.wide);
    lay_token<T>(at, kind, columns, token, [&](uint k) { return k < columns ? turned[slot(k)] : 0.0f; });
  } else {
    lay_token<T>(at, kind, columns, token, [&](uint k) {
      if (k >= uint(in.r.columns)) return 0.0f;
      const float v = load_number(in.x, begin + k, in.dtype);
      square = fmaf(v, v, square);
      return in.gamma ? v * in.gamma[k] : v;
    });
  }
  if (in.gamma) {
    square = block_sum(square, shared_at<float>(at.join));
    const float mean = __fdiv_rn(square, float(in.r.columns));
    if (threadIdx.x == 0) shared_at<float>(at.inverse)[token] = __frcp_rn(__fsqrt_rn(mean + in.eps));
  }
  __syncthreads();
}

// y[t, a, n] = residual[t, a, n] + x[t] . W[expert[t, a]][n]
//   in: columns of x     columns: of the weight     rows, part_count: of an expert     slots: experts of a token, whose
//   numbers are in `expert` (null: 0)     turns: rotated parts have x rotated here     height: rows of a block
// Blocks: (t / T * slots, pieces of `height` rows of parts): those that read the same codes are neighbours.
template <int T>
struct qmatvec {
  static constexpr int THREADS = 32 * WARPS, BLOCKS = 2;
  static __device__ __forceinline__ void run(const void* x, const float* gamma, const float* pre, const float* post,
                                             const uint* words, const uint* parts, const int* expert,
                                             const void* residual, void* y, int in, int columns, int rows,
                                             int part_count, int slots, int tokens, int height, int turns, int block,
                                             int pres, int posts, float eps, int dtype) {
    const uint slot_of = blockIdx.x % slots, first = blockIdx.x / slots * T;
    const Places at = places_for<T>(columns);
    clear_zeros<T>();
    if (expert) wait_for_previous();
    const size_t table = expert ? size_t(expert[first * slots + slot_of]) * part_count : 0;
    uint piece_of = blockIdx.y, begin = slot_of * rows;
    Part part;
    int p = 0;
    for (; p < part_count; p++) {
      part = part_at(parts, table + p);
      const uint pieces = (part.rows + height - 1) / height;
      if (piece_of < pieces) break;
      piece_of -= pieces, begin += part.rows;
    }
    if (p == part_count) {
      if (!expert) wait_for_previous();
      return;
    }
    const uint own = is_rotated(part.kind) ? columns : in;  // columns of the part
    const Input input{x, gamma, dtype, eps, {pre, post, in, turns ? columns : 0, block, pres, posts}};
    const uint from = piece_of * height, end = min_of(from + height, part.rows);
    fetch_rows(words, part, own, from, min_of(from + 32, end));
    if (!expert) wait_for_previous();
    __syncthreads();
    for (int t = 0; t < T; t++) lay_input<T>(input, at, part.kind, own, t, min_of(first + t, tokens - 1));
    // what is wanted after a product waits in shared memory: registers are for the product
    uint* later = shared_at<uint>(at.inverse) + 16;
    if (threadIdx.x == 0) later[0] = begin, later[1] = uint(table + p), later[2] = end, later[3] = first;
    __syncthreads();
    for (uint n = from; n < later[2]; n += CHUNK<T>) {
      const uint* of = parts + size_t(later[1]) * 8;
      const uint kind = of[1], wide = is_rotated(kind) ? columns : in;
      fetch_rows(words, part_at(of, 0), wide, n + CHUNK<T>, min_of(n + CHUNK<T> + 32, later[2]));
      part_rows<T>(words, of, kind, wide, n, min_of(n + CHUNK<T>, later[2]));
      const uint count = min_of(CHUNK<T>, later[2] - n);
      uint thread = threadIdx.x;
      keep_here(thread);
      HM_NO_UNROLL for (uint i = thread; i < count * T; i += THREADS) {
        const uint token = later[3] + i % T;
        if (token >= uint(tokens)) continue;
        const size_t to = size_t(token) * slots * rows + later[0] + n + i / T;
        float v = results<T>()[i];
        if (gamma) v *= shared_at<float>(at.inverse)[i % T];
        store_number(y, to, dtype, residual ? load_number(residual, to, dtype) + v : v);
      }
    }
  }
};

}  // namespace hm
