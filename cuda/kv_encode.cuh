// Pages of keys or values to codes and back, and the tokens of a prompt to a cache.
#pragma once
#include "kv_decode.cuh"
#include "kv_page.cuh"

namespace hm {

// Pages [pages, 64, D] to [pages, bytes]; a block each. Meaning: kv_ops.kv_encode. Shared: 64 D bytes.
template <int D>
struct kv_encode {
  static constexpr int THREADS = D;
  static __device__ void run(const void* rows, const float* signs, const float* book, unsigned char* pages, int codec,
                             int values, float scale, int dtype) {
    const Side side{codec, values, signs, book, scale};
    const size_t p = blockIdx.x;
    wait_for_previous();
    const PageRows from(nullptr, 0, rows, p * PAGE * D, 0, dtype);
    encode_page<D>(side, from, reinterpret_cast<uint*>(pages) + p * page_words(codec, D), shared_memory<unsigned char>());
  }
};

// Pages [pages, bytes] to the rows they stand for, [pages, 64, D]; a warp has a row. Meaning: kv_ops.kv_decode. Blocks:
// (8 pages). With a table pages are [places, groups, bytes], rows [b, groups, pages, 64, D], blocks (8 pages, groups, b), and a
// page that has no place is zeros. No loop over rows: NVRTC makes one for each codec and dtype of it, which takes minutes.
template <int D>
struct kv_decode {
  static constexpr int THREADS = 256, ROWS = THREADS / 32, PIECES = PAGE / ROWS;
  static __device__ void run(const unsigned char* pages, const float* signs, const float* book, const int* table, void* rows,
                             int codec, int values, float scale, int dtype) {
    const Side side{codec, values, signs, book, scale};
    const uint p = blockIdx.x / PIECES, count = gridDim.x / PIECES, token = blockIdx.x % PIECES * ROWS + warp_index();
    const size_t to = (size_t(blockIdx.z) * gridDim.y + blockIdx.y) * count + p, row = (to * PAGE + token) * D;
    wait_for_previous();
    const int place = table ? table[blockIdx.z * count + p] : 0;
    const size_t from = table ? size_t(place) * gridDim.y + blockIdx.y : to;
    if (place < 0) {
      EACH(i, D / 32) store_number(rows, row + lane_index() + 32 * i, dtype, 0.0f);
      return;
    }
    decode_row<D>(side, reinterpret_cast<const uint*>(pages) + from * page_words(codec, D), token, rows, row, dtype);
  }
};

// Tokens of a prompt to a cache: the first page, the newest and the one before it raw, full ones as codes.
//   kv [2, b, groups, t, D]: keys and values, a sequence's tokens its last `counts`; lengths: tokens before; raw
//   [2, b, groups, 192, D]; pages [places, groups, bytes], page p of a sequence at table [b, m], or without a table
//   [b, groups, m, bytes] at p - skip.
// Blocks: (pages touched, 2 groups, b), each a page of one side. Shared: 64 D bytes.
template <int D>
struct kv_append {
  static constexpr int THREADS = D, BLOCKS = 768 / D;  // left alone, ptxas wants more of them and spills

  // What comes to a sequence: tokens begin .. end - 1. Made anew after a page is encoded, which needs the registers.
  struct Tokens {
    uint begin, end, first, p, newest;
    size_t kv_at, raw_at;  // row of this sequence's token 0, were it in kv (numbers wrap, and wrap back); its first raw row
    __device__ Tokens(const int* lengths, const int* counts, uint tokens, uint side, uint groups) {
      const uint b = blockIdx.z, count = counts ? counts[b] : tokens;
      const size_t seq = (size_t(side) * gridDim.z + b) * groups + blockIdx.y % groups;
      begin = lengths[b], end = begin + count, first = begin / PAGE, p = first + blockIdx.x, newest = (end - 1) / PAGE;
      kv_at = seq * tokens + (tokens - count) - size_t(begin), raw_at = seq * 3 * PAGE;
    }
    __device__ bool here() const { return end > begin && p * PAGE < end; }
    // Raw rows of page `page` among the new tokens.
    __device__ void keep(uint page, const void* kv, void* raw, int dtype) const {
      const uint from = begin > page * PAGE ? begin : page * PAGE, last = min_of(end, (page + 1) * PAGE);
      const size_t rows = (raw_at + raw_slot(page) * PAGE - size_t(page) * PAGE) * D;
      for (uint i = from * D + threadIdx.x; i < last * D; i += D)
        store_number(raw, rows + i, dtype, load_number(kv, kv_at * D + i, dtype));
    }
  };

  static __device__ void run(const void* kv, const int* lengths, const int* counts, const int* table, const float* key_signs,
                             const float* value_signs, const float* book, void* raw, unsigned char* key_pages,
                             unsigned char* value_pages, int tokens, int m, int skip, int key, int value, float key_scale,
                             float value_scale, int dtype) {
    const uint groups = gridDim.y / 2, values = blockIdx.y / groups;
    wait_for_previous();
    {
      const Tokens at(lengths, counts, tokens, values, groups);
      if (!at.here()) return;
      if (at.p && (at.p + 1) * PAGE <= at.end) {
        const Side side{values ? value : key, int(values), values ? value_signs : key_signs, book + 16 * values,
                        values ? value_scale : key_scale};
        const uint b = blockIdx.z, g = blockIdx.y % groups;
        const size_t place = table ? size_t(table[b * m + at.p]) * groups + g : (size_t(b) * groups + g) * m + at.p - skip;
        uint* page = reinterpret_cast<uint*>(values ? value_pages : key_pages) + place * page_words(side.codec, D);
        const PageRows rows(raw, (at.raw_at + raw_slot(at.p) * PAGE) * D, kv, (at.kv_at + at.p * PAGE) * D,
                            at.p == at.first ? at.begin % PAGE : 0, dtype);
        encode_page<D>(side, rows, page, shared_memory<unsigned char>());
        __syncthreads();
      }
    }
    const Tokens at(lengths, counts, tokens, values, groups);
    // the raw rows of the first page, which its block has read, may be another page's from now on
    const bool shares = at.first && at.p != at.first && raw_slot(at.p) == raw_slot(at.first);
    if ((at.p == 0 || at.p + 1 >= at.newest) && !shares) at.keep(at.p, kv, raw, dtype);
    if (at.p == at.first && at.first && at.newest >= at.first + 2)
      at.keep(at.newest - (at.newest - at.first) % 2, kv, raw, dtype);
  }
};

}  // namespace hm
