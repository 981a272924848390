// post * H(pre * x), a block per row. Meaning: reference.hadamard, bit for bit. x may go through RMSNorm first: H is
// linear, so that 1 / rms is a factor of the result.
#pragma once
#include "rotate.cuh"

namespace hm {

// Rows of up to 256 * COUNT numbers, or pieces of that length, whose blocks hadamard_join finishes: f32 then.
// Blocks: (rows, pieces). Shared: padded(span) floats and one for each warp.
template <int COUNT>
struct hadamard {
  static constexpr int THREADS = 256;
  static constexpr int BLOCKS = COUNT < 16 ? 0 : 3;  // left alone, ptxas wants four on sm_100 and spills
  static __device__ void run(const void* x, const float* gamma, const float* pre, const float* post, void* y,
                             int columns, int wide, int block, int pres, int posts, int span, float eps, int x_dtype,
                             int y_dtype) {
    const Rotation r{pre, post, columns, wide, block, pres, posts};
    float *row = shared_memory<float>(), *partial = row + padded(span);
    const uint begin = blockIdx.y * span;
    wait_for_previous();
    float square = rotate<COUNT>(r, x, size_t(blockIdx.x) * columns, x_dtype, gamma, row, begin, span);
    float inverse = 1.0f;
    if (gamma) {
      square = block_sum(square, partial);
      inverse = __frcp_rn(__fsqrt_rn(__fdiv_rn(square, float(columns)) + eps));
    }
    for (uint i = threadIdx.x; i < uint(span) && begin + i < uint(wide); i += blockDim.x) {
      const float v = row[slot(i)];
      store_number(y, size_t(blockIdx.x) * wide + begin + i, y_dtype, gamma ? v * inverse : v);
    }
  }
};

// The stages from `span` on, between up to COUNT pieces. Blocks: (rows, span / THREADS).
template <int COUNT>
struct hadamard_join {
  static constexpr int THREADS = 256;
  static __device__ void run(const float* pieces, const float* post, void* y, int wide, int block, int posts, int span,
                             int y_dtype) {
    const Rotation r{nullptr, post, wide, wide, block, 1, posts};
    const uint j = blockIdx.y * THREADS + threadIdx.x;
    const size_t row = size_t(blockIdx.x) * wide;
    wait_for_previous();
    float v[COUNT];
    EACH(m, COUNT) v[m] = j + span * m < uint(wide) ? pieces[row + j + span * m] : 0.0f;
    far_stages<COUNT>(r, v, j, span);
    EACH(m, COUNT) {
      const uint i = j + span * m;
      if (i >= uint(wide)) continue;
      const float n = orthonormal(r, v[m], i);
      store_number(y, row + i, y_dtype, post ? n * post[i % posts] : n);
    }
  }
};

}  // namespace hm
