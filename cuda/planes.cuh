// Tokens as products read them: 24-bit fixed point in three signed bytes, x = 2^16 h + 2^8 m + l, with a power of two
// for each 128 columns, the smallest that holds the largest of them: off by 2^-23 of it at most, as sums in f32 are.
//
// In shared memory, for T tokens:
//   bytes   [block of 128][token][h m l][lane t < 4][32]: the columns that lane t of four multiplies, in the order in
//           which codes leave their words. Where a lane takes 64 columns at once, two blocks hold their halves:
//           block 2 s + i has the columns 256 s + 64 t + 32 i .. + 31. The 16-byte halves of m and l are exchanged,
//           so that lanes which read h and m meet different banks.
//   sums    [span][token][2]: of a span's columns; what lanes t with t % 2 == 0, and 1, need:
//           { start of h, start of m, 256 u, sum of x } and { start of nothing, start of l, u, 0 }
//           start: MAGIC - centre * sum of the plane, u: the power of two (NaN where x is not finite)
//   zeros   as many bytes of them as a lane's columns of a step are apart, for lanes that have no part in a column
//   join    [16 rows][warp][row][token] f32: what warps that share columns have of CHUNK rows; results: their sums
#pragma once
#include "codes.cuh"

namespace hm {

constexpr int WARPS = 8;  // of a block that multiplies
// 1.5 * 2^23 as bits: MAGIC + i is the f32 1.5 * 2^23 + i for |i| < 2^22. An addition of f32 converts an integer, at
// four times the speed of a conversion.
constexpr int MAGIC = 0x4b400000;

// Where things lie, in bytes from the beginning of shared memory.
struct Places {
  uint zeros, results, join, inverse, bytes, sums, turned;
};
// Rows of a block at once, at most.
template <int T>
constexpr uint CHUNK = T > 2 ? 64 : 128;
template <int T>
constexpr uint ZEROS = 768 * T;
// Planes and sums of rows of `columns` numbers, at any span.
__host__ __device__ constexpr uint whole_blocks(uint columns) { return (columns + 255) / 256 * 2; }
template <int T>
__host__ __device__ constexpr Places places_for(uint columns) {
  const uint blocks = whole_blocks(columns);
  const uint join = ZEROS<T> + CHUNK<T> * T * 4, inverse = join + CHUNK<T> * WARPS * T * 4, bytes = inverse + 128;
  const uint sums = bytes + blocks * T * 384;
  return {0, ZEROS<T>, join, inverse, bytes, sums, sums + blocks * T * 4 * 32};
}
template <class A>
__device__ inline A* shared_at(uint place) {
  return reinterpret_cast<A*>(shared_memory<unsigned char>() + place);
}

// Zeros for lanes without a part in a column; a barrier must follow.
template <int T>
__device__ inline void clear_zeros() {
  for (uint i = threadIdx.x; i < ZEROS<T> / 4; i += blockDim.x) shared_memory<uint>()[i] = 0;
}

// Sums of the planes' words over a span's lanes, to shared memory by the first of them.
template <int T>
__device__ inline void store_sums(const Places& at, const Form& form, uint block, int token, const uint* words, float unit) {
  int sum[3];
  EACH(p, 3) {
    sum[p] = __dp4a(int(words[p]), 0x01010101, 0);
    HM_UNROLL for (int d = 1; d < 8; d *= 2) sum[p] += __shfl_xor_sync(FULL, sum[p], d);
    if (form.span >= 64) sum[p] += __shfl_xor_sync(FULL, sum[p], 8);
    if (form.span >= 128) sum[p] += __shfl_xor_sync(FULL, sum[p], 16);
  }
  const uint lanes = uint(form.span) / 4, lane = lane_index();
  if (lane % lanes) return;
  const float total = fmaf(float(sum[0] * 256 + sum[1]), 256.0f, float(sum[2])) * unit;
  int start[3];
  EACH(p, 3) start[p] = MAGIC - form.centre * sum[p];
  int4* to = shared_at<int4>(at.sums) + (((32 * block + lane) / lanes) * T + token) * 2;
  to[0] = make_int4(start[0], start[1], __float_as_int(256.0f * unit), __float_as_int(total));
  to[1] = make_int4(MAGIC, start[2], __float_as_int(unit), 0);
}

// Planes and sums of one token by `warps` warps, of which this is number `warp`. get(k): column k of x, 0 behind the
// last one. No barriers.
template <int T, class Get>
__device__ inline void make_planes(const Places& at, const Form& form, uint columns, int token, Get get, uint warp, uint warps) {
  const uint lane = lane_index(), q = lane % 8;
  const uint blocks = form.wide == 64 ? whole_blocks(columns) : (columns + 127) / 128;
  for (uint block = warp; block < blocks; block += warps) {
    const uint first = 128 * block + lane / 8 * 32;
    float x[4];
    EACH(j, 4) x[j] = get(first + column_of(form.order, q, j));
    uint largest = 0;
    EACH(j, 4) {
      const uint size = __float_as_uint(x[j]) & 0x7fffffffu;
      largest = largest > size ? largest : size;
    }
    largest = warp_largest(largest);
    const bool finite = largest < 0x7f800000u;
    const int e = Fixed<3>::exponent(largest);
    int v[4];
    uint words[3];
    EACH(j, 4) v[j] = finite ? Fixed<3>::of(x[j], e) : 0;
    three_bytes(v, words);
    // one infinity makes all rows NaN
    store_sums<T>(at, form, block, token, words, Fixed<3>::unit(largest, e));
    uint to = block, lane_of = lane / 8;
    if (form.wide == 64) {
      const uint chunk = block % 2 * 4 + lane / 8;
      to = block - block % 2 + chunk % 2, lane_of = chunk / 2;
    }
    uint* plane = shared_at<uint>(at.bytes) + (to * T + token) * 96 + 8 * lane_of;
    EACH(p, 3) plane[32 * p + (p ? q ^ 4 : q)] = words[p];
  }
}

// x as it is, f32, for rows of plain numbers: column k at slot(k), 0 up to a multiple of 256.
template <int T, class Get>
__device__ inline void make_numbers(const Places& at, uint columns, int token, Get get, uint warp, uint warps) {
  const uint wide = (columns + 255) / 256 * 256;
  float* x = shared_at<float>(at.bytes) + token * wide;
  for (uint k = 32 * warp + lane_index(); k < wide; k += 32 * warps) x[slot(k)] = get(k);
}

}  // namespace hm
