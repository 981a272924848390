// What a prompt's product (qmatmul.cuh) reads: tokens as tensor cores take them, and which tiles there are.
#pragma once
#include "qmatmul_codes.cuh"

namespace hm {

// A record is PLANES times 128 bytes and 8 floats:
//   0: the unit   1: sum of its 128 columns   2, 3: of 64   4 .. 7: of 32
// Byte 16 c + 4 t + b of a plane is what lane t of four multiplies: a step of 32 columns, s = c / 2, has 8 for each lane.
__host__ __device__ constexpr int record_bytes(int planes) { return 128 * planes + 32; }

__device__ inline uint largest_bits(const float* v) {
  uint top = 0;
  EACH(i, 4) top = max(top, __float_as_uint(v[i]) & 0x7fffffffu);
  return warp_largest(top);
}

// Tokens to records [variant][token][record]. A warp has 128 columns of one token, a lane four of them.
// Blocks: (tokens * blocks / 8, variants). Shared: 4 KB.
//   rotated: f32 [tokens, wide], for variants with bit 3 set; null: they read x, which is rotated then
//   forms: 4 bits for each variant
template <int PLANES>
struct qmatmul_tokens {
  static constexpr int THREADS = 256, BYTES = record_bytes(PLANES);

  static __device__ void fixed_point(const float* v, int form, int* line, char* record) {
    using Is = Fixed<PLANES>;
    const uint top = largest_bits(v), lane = lane_index();
    const bool finite = top < 0x7f800000u;
    const int e = Is::exponent(top);
    const float unit = Is::unit(top, e);
    int sum = 0;
    EACH(i, 4) {
      const int n = finite ? Is::of(v[i], e) : 0;
      line[4 * lane + i] = n;
      sum += n;
    }
    float* facts = reinterpret_cast<float*>(record + 128 * PLANES);
    if (lane == 0) facts[0] = unit;
    HM_UNROLL for (int d = 1; d < 32; d *= 2) {
      sum += __shfl_xor_sync(FULL, sum, d);
      if (d >= 4 && lane % (2 * d) == 0) facts[16 / d + lane / (2 * d)] = float(sum) * unit;
    }
    __syncwarp();
    uint word[PLANES];
    EACH(p, PLANES) word[p] = 0;
    EACH(b, 4) {
      const int n = line[lane / 8 * 32 + column_of(form, lane % 4 * 2 + lane / 4 % 2, b)];
      EACH(p, PLANES) word[p] |= byte_of<PLANES>(n, p) << 8 * b;
    }
    EACH(p, PLANES) reinterpret_cast<uint*>(record)[32 * p + lane] = word[p];
  }

  // Sums of 16-bit numbers, each nearer to v: what the ones before leave is a number of f32.
  static __device__ void terms(float* v, int form, char* record) {
    const uint top = largest_bits(v), lane = lane_index() % 16;
    float unit = 1.0f;
    if (form == HALVES) {
      const int e = fixed_exponent(top, 8380416);  // at most 65504
      unit = top < 0x7f800000u ? scaled(1.0f, e - 16) : 1.0f;
      if (top < 0x7f800000u) EACH(i, 4) v[i] = scaled(v[i], 16 - e);
    }
    if (lane_index() % 16 == 0) reinterpret_cast<float*>(record + 128 * PLANES)[0] = unit;
    EACH(p, PLANES) {
      uint bits[4];
      EACH(i, 4) {
        bits[i] = form == HALVES ? uint(__half_as_ushort(__float2half_rn(v[i])))
                                 : uint(__bfloat16_as_ushort(__float2bfloat16_rn(v[i])));
        v[i] -= form == HALVES ? from_f16(bits[i]) : from_bf16(bits[i]);
        if (!(fabsf(v[i]) < __uint_as_float(0x7f800000u))) v[i] = 0.0f;  // of an infinity nothing is left
      }
      reinterpret_cast<uint2*>(record)[16 * p + lane] = make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
    }
  }

  static __device__ void run(const void* x, const float* rotated, void* records, int tokens, int columns, int wide,
                             int per_token, int forms, int x_dtype) {
    const int blocks = (wide + 127) / 128, at = blockIdx.x * 8 + warp_index();
    const int token = at / blocks, block = at % blocks, form = forms >> 4 * blockIdx.y & 7;
    const bool turned = rotated && forms >> 4 * blockIdx.y & 8;
    wait_for_previous();
    if (token >= tokens) return;
    const int length = turned ? wide : columns, dtype = turned ? int(F32) : x_dtype;
    const void* from = turned ? static_cast<const void*>(rotated) : x;
    float v[4];
    EACH(i, 4) {
      const int column = 128 * block + 4 * lane_index() + i;
      v[i] = column < length ? load_number(from, size_t(token) * length + column, dtype) : 0.0f;
    }
    const size_t first = (size_t(blockIdx.y) * tokens + token) * per_token;
    char* to = static_cast<char*>(records) + first * BYTES;
    if (form < HALVES) fixed_point(v, form, shared_memory<int>() + 128 * warp_index(), to + block * BYTES);
    else terms(v, form, to + (2 * block + lane_index() / 16) * BYTES);
  }
};

// Tiles of at most `most` pairs of one expert, from the ascending experts of all pairs: an expert, its first pair in the
// tile and the one behind the last. tiles [0][0]: how many there are, which the host need not know. One block.
struct qmatmul_schedule {
  static constexpr int THREADS = 256;
  static __device__ int first_of(const int* expert, int pairs, int e) {
    int low = 0, high = pairs;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (expert[middle] < e) low = middle + 1;
      else high = middle;
    }
    return low;
  }
  static __device__ void run(const int* expert, int* tiles, int pairs, int experts, int most) {
    int* ends = shared_memory<int>();  // of the warps' tiles
    int before = 0;
    wait_for_previous();
    for (int base = 0; base < experts; base += THREADS) {
      const int e = base + threadIdx.x;
      const int first = e < experts ? first_of(expert, pairs, e) : 0;
      const int end = e < experts ? first_of(expert, pairs, e + 1) : 0;
      const int count = (end - first + most - 1) / most;
      int sum = count;
      HM_UNROLL for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(FULL, sum, d);
        if (lane_index() >= uint(d)) sum += other;
      }
      if (lane_index() == 31) ends[warp_index()] = sum;
      __syncthreads();
      int at = before + sum - count;
      EACH(w, THREADS / 32) {
        if (uint(w) < warp_index()) at += ends[w];
        before += ends[w];
      }
      __syncthreads();
      for (int i = 0; i < count; i++, at++) {
        int* tile = tiles + 4 * (at + 1);
        tile[0] = e, tile[1] = first + i * most, tile[2] = min(first + (i + 1) * most, end);
      }
    }
    if (threadIdx.x == 0) tiles[0] = before;
  }
};

}  // namespace hm
