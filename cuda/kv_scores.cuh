// The integers behind the scores of our codecs, by themselves, so that backends can be held to each other. Meaning:
// kv_ops.kv_scores.
#pragma once
#include "kv_integers.cuh"
#include "kv_row.cuh"

namespace hm {

// q [rows, D], pages [pages, bytes] to q8 [rows, D], unit [rows], scores [rows, 64 pages]. Blocks: (pages, eights of rows),
// a warp each half a page. Shared: 8 D bytes.
template <int D>
struct kv_scores {
  static constexpr int THREADS = 64, N = D / 32;
  static __device__ void run(const void* q, const unsigned char* pages, const float* signs, signed char* q8, float* unit,
                             int* scores, int rows, int codec, int q_dtype) {
    signed char* bytes = shared_memory<signed char>();
    const uint first = 8 * blockIdx.y, lane = lane_index();
    const uint* page = reinterpret_cast<const uint*>(pages) + size_t(blockIdx.x) * page_words(codec, D);
    wait_for_previous();
    for (uint r = warp_index(); r < 8; r += THREADS / 32) {
      const bool there = first + r < uint(rows), mine = there && blockIdx.x == 0;
      float v[N];
      EACH(i, N) v[i] = there ? load_number(q, size_t(first + r) * D + lane + 32 * i, q_dtype) : 0.0f;
      const float one = query_row<N>(v, signs, root_of(D));
      if (mine && lane == 0) unit[first + r] = one;
      EACH(i, N) {
        bytes[r * D + lane + 32 * i] = (signed char)(v[i]);
        if (mine) q8[size_t(first + r) * D + lane + 32 * i] = (signed char)(v[i]);
      }
    }
    __syncthreads();
    int sums[2][4];
    const signed char* query = bytes + lane / 4 * D;
    switch (codec) {
      case kv_h2: code_sums<2, D>(page, warp_index(), query, sums); break;
      case kv_h3: code_sums<3, D>(page, warp_index(), query, sums); break;
      case kv_h4: code_sums<4, D>(page, warp_index(), query, sums); break;
      default: code_sums<8, D>(page, warp_index(), query, sums);
    }
    EACH(i, 2) EACH(e, 4) {
      const uint row = first + lane % 4 * 2 + e % 2, token = warp_index() * 32 + lane / 4 * 4 + 2 * i + e / 2;
      if (row < uint(rows)) scores[(size_t(row) * gridDim.x + blockIdx.x) * PAGE + token] = sums[i][e];
    }
  }
};

}  // namespace hm
