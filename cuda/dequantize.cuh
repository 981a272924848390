// Rows of a weight as numbers, a block for each. Meaning: reference.dequantize, bit for bit: scale * number and the sum
// with the bias are rounded one after the other.
#pragma once
#include "codes.cuh"

namespace hm {

// Number k of a row before scale and bias.
__device__ inline float number_at(const uint* row, const uint* words, const Part& part, uint k) {
  const int table = table_of(part.kind), bits = bits_of(part.kind);
  if (table == PLAIN) {
    return bits == 32 ? __uint_as_float(row[k]) : scale_number(row[k / 2] >> 16 * (k % 2) & 0xffffu, scale_of(part.kind));
  }
  // GGUF: 16 bytes hold codes 0 .. 15 in their lower halves, 16 .. 31 above
  const uint bit = table == E2M1_GGUF ? k / 32 * 128 + k % 16 * 8 + k % 32 / 16 * 4 : k * bits, shift = bit % 32;
  uint code = row[bit / 32] >> shift;
  if (shift + bits > 32) code |= row[bit / 32 + 1] << (32 - shift);
  code &= (1u << bits) - 1;
  if (table == CODEBOOK) return __uint_as_float(piece(words, part.table)[code]);
  if (table == LINEAR) return float(code);
  if (table == LINEAR_SIGNED) return float(int(code) - (1 << (bits - 1)));
  const uint size = code & 7;
  const float v = size < 2 ? 0.5f * float(size) : __uint_as_float((size >> 1) + 126 << 23 | (size & 1) << 22);
  return code & 8 ? -v : v;
}

// y[i] = row index[i], counted over experts, of `rows` rows each. Blocks: (i).
struct dequantize {
  static constexpr int THREADS = 256;
  static __device__ void run(const int* index, const uint* words, const uint* parts, void* y, int columns, int rows,
                             int experts, int part_count, int dtype) {
    wait_for_previous();
    const uint flat = min_of(uint(index[blockIdx.x]), uint(experts) * rows - 1);
    size_t p = size_t(flat / rows) * part_count;
    uint n = flat % rows;
    Part part = part_at(parts, p);
    while (n >= part.rows) n -= part.rows, part = part_at(parts, ++p);
    const int scale = scale_of(part.kind), table = table_of(part.kind);
    const uint group = group_of(part.kind), groups = group ? (columns + group - 1) / group : 1;
    const uint* row = piece(words, part.codes) + size_t(n) * part.stride;
    for (uint k = threadIdx.x; k < uint(columns); k += THREADS) {
      float v = number_at(row, words, part, k);
      if (table != PLAIN) {
        const size_t g = size_t(n) * groups + (group ? k / group : 0);
        v = __fmul_rn(v, scale_number(stored(words, part.scale, g, scale), scale));
        if (table == LINEAR && part.bias != NONE)
          v = __fadd_rn(v, scale_number(stored(words, part.bias, g, scale), scale));
      }
      store_number(y, size_t(blockIdx.x) * columns + k, dtype, v);
    }
  }
};

}  // namespace hm
