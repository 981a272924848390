// The delta rule of many tokens, in order, and their gated norm.
//
// A warp walks all tokens with 8 columns of a head's state in registers, 2 columns of 16 rows in a lane, so a sum down a
// column is chains in a lane and three shuffles, with no barrier. Four warps share the q, k and v that cp.async brings 8 to
// 16 tokens ahead; they meet once in 8 tokens. 32 heads of 128 columns are 512 warps in 128 blocks: one warp for each
// scheduler of an H200's 132 multiprocessors.
//
// Cycles of a token, one warp a scheduler: nvcc 13.0 makes 183 instructions for sm_90a, 132 of them f32 multiplications and
// additions of the state (S k, S q of the token before, decay, update: 32 each). The chain from token to token is
// 32 + 8 (S k) + 3 * 27 (shuffles) + 8 (what to learn) + 32 (update) = ~160; S q, decay and loads, which are not in it,
// stand between its shuffles. Shared memory gives 128 bytes a cycle to four warps: 4 * (8 loads * 4 + 2 + 9 shuffles) =
// 172. So ~190 cycles: 0.44 ms for 4,096 tokens of a layer at 1.755 GHz, 13 ms in 30 layers; f32 instructions alone
// (4 a number of the state: 4096 * 32 * 128 * 128 * 4 / (132 * 128)) are 0.29 ms. More rows and fewer columns in a lane
// take fewer shuffles, but read q and k more often than shared memory can give them.
// The chunked form (64 tokens as matrices, arXiv 2412.06464) needs 2 (4 C^2 d + 3 C d^2) operations a chunk and head, at
// C = 64, d = 128 10.5 M: 21 G a layer, 10.7 G multiply-adds = 0.36 ms in f32, no less than the scan's. It wins only on
// tensor cores in 16 bits, which would not be f32's result, nor the same for a prompt cut elsewhere.
#pragma once
#include "gated_delta.cuh"

namespace hm {

// dk up to 8 ROWS. Blocks: (32 columns, value heads, sequences). state and new_state may be the same array.
template <int ROWS>
struct delta_scan {
  static constexpr int THREADS = 128, COLUMNS = 32, DK = 8 * ROWS, TOKENS = 128 / ROWS;
  static constexpr int STRIDE = 2 * DK + COLUMNS + 4;  // floats of a token: q, k, v, decay, beta
  static constexpr int SHARED = 4 * 3 * TOKENS * STRIDE;  // bytes: TOKENS in use, as many next, as many on their way

  static __device__ void copy(float* to, const float* from, int n, bool fours) {
    if (fours) {
      for (int i = 4 * lane_index(); i < n; i += 128) copy_async<16>(to + i, from + i);
    } else {
      for (int i = lane_index(); i < n; i += 32) copy_async<4>(to + i, from + i);
    }
  }
  static __device__ int row(int i) { return i / 4 * 32 + int(lane_index()) / 4 * 4 + i % 4; }  // of this lane
  static __device__ void load_rows(const float* from, float* v) {
    EACH(j, ROWS / 4) {
      const float4 f = *reinterpret_cast<const float4*>(from + row(4 * j));
      v[4 * j] = f.x, v[4 * j + 1] = f.y, v[4 * j + 2] = f.z, v[4 * j + 3] = f.w;
    }
  }
  // This lane's part of the sums down its two columns of s times x.
  static __device__ void down(const float (*s)[2], const float* x, float* sum) {
    float chain[2][2] = {};
    EACH(i, ROWS) {
      EACH(j, 2) chain[j][i % 2] = fmaf(s[i][j], x[i], chain[j][i % 2]);
    }
    EACH(j, 2) sum[j] = chain[j][0] + chain[j][1];
  }
  // Both sums in all lanes that have the columns.
  static __device__ void join(float* sum) {
    HM_UNROLL for (int d = 4; d < 32; d *= 2) {
      EACH(j, 2) sum[j] += __shfl_xor_sync(FULL, sum[j], d);
    }
  }
  // The sum of one of the columns: the second in lanes 4 .. 7, which write it.
  static __device__ float join_one(const float* sum) {
    const int own = lane_index() / 4 % 2;
    float one = (own ? sum[1] : sum[0]) + __shfl_xor_sync(FULL, own ? sum[0] : sum[1], 4);
    one += __shfl_xor_sync(FULL, one, 8);
    return one + __shfl_xor_sync(FULL, one, 16);
  }

  // A block's tokens: where they are and how they come.
  struct Tokens {
    const float *q, *k, *v, *gates;  // of the sequence's first token
    float* ring;
    int channels, hv, dk, columns, end;
    bool fours;
    __device__ void fetch(int first) const {
      for (int t = first + warp_index(); t < min(first + TOKENS, end); t += THREADS / 32) {
        float* to = ring + t % (3 * TOKENS) * STRIDE;
        const size_t row = size_t(t) * channels;
        copy(to, q + row, dk, fours);
        copy(to + DK, k + row, dk, fours);
        copy(to + 2 * DK, v + row, columns, fours);
        if (lane_index() == 0) copy_async<8>(to + 2 * DK + COLUMNS, gates + size_t(t) * 2 * hv);
      }
      copies_commit();
    }
  };

  // What a token brings to the state, besides q.
  struct Token {
    float k[ROWS], v[2];
    float2 gate;
    __device__ void load(const float* from, int column) {
      load_rows(from + DK, k);
      EACH(j, 2) v[j] = from[2 * DK + column + j];
      gate = *reinterpret_cast<const float2*>(from + 2 * DK + COLUMNS);
    }
  };

  // s after all tokens; o: of the column that this lane writes, rows apart.
  static __device__ void walk(const Tokens& tokens, float (*s)[2], int column, float* o, int stride, bool writes) {
    Token now, next;
    float q[ROWS] = {};
    const float *at = tokens.ring, *last = tokens.ring + (3 * TOKENS - 1) * STRIDE;
    now.load(at, column);
    o -= stride;  // a token's is written after the next one's sums have begun
    for (int first = 0; first < tokens.end; first += TOKENS) {
      tokens.fetch(first + 2 * TOKENS);
      const int stop = min(first + TOKENS, tokens.end);
      _Pragma("unroll 2") for (int t = first; t < stop; t++) {
        const float* from = at;
        at = at == last ? tokens.ring : at + STRIDE;
        next.load(at, column);
        float sum[2], out[2];
        down(s, now.k, sum);
        join(sum);
        down(s, q, out);
        const float before = join_one(out);
        if (writes && t > 0) *o = before;
        o += stride;
        load_rows(from, q);
        EACH(j, 2) {
          const float learnt = yet_to_learn(now.v[j], sum[j], now.gate.x, now.gate.y);
          EACH(i, ROWS) s[i][j] = next_state(s[i][j], now.gate.x, learnt, now.k[i]);
        }
        now = next;
      }
      copies_wait();
      __syncthreads();
    }
    float out[2];
    down(s, q, out);
    const float before = join_one(out);
    if (writes) *o = before;
  }

  static __device__ void run(const float* qkv, const float* gates, const float* state, const int* lengths, float* o,
                             float* new_state, int tokens, int hk, int hv, int dk, int dv) {
    const Heads heads{hk, hv, dk, dv};
    const int begin = blockIdx.x * COLUMNS, h = blockIdx.y, b = blockIdx.z, key = h / (hv / hk) * dk;
    const int column = 8 * warp_index() + 2 * (lane_index() % 4), mine = begin + column;
    const size_t first_row = size_t(b) * tokens, first = (size_t(b) * hv + h) * dk * dv + mine;
    float s[ROWS][2], *ring = shared_memory<float>();
    EACH(i, ROWS) {  // before the wait: prepare does not write it
      EACH(j, 2) s[i][j] = row(i) < dk && mine + j < dv ? state[first + row(i) * dv + j] : 0.0f;
    }
    for (int i = threadIdx.x; i < SHARED / 4; i += THREADS) ring[i] = 0.0f;  // rows that are not there stay 0
    __syncthreads();
    wait_for_previous();
    const int end = tokens_of(lengths, b, tokens);
    const float* from = qkv + first_row * heads.channels();
    const Tokens all{from + key,
                     from + hk * dk + key,
                     from + 2 * hk * dk + h * dv + begin,
                     gates + (first_row * hv + h) * 2,
                     ring,
                     heads.channels(),
                     hv,
                     dk,
                     min(COLUMNS, dv - begin),
                     end,
                     (dk | dv) % 4 == 0};
    all.fetch(0);
    all.fetch(TOKENS);
    copies_wait();
    __syncthreads();
    const int writes = lane_index() / 4;  // 0 and 1: the first and the second column
    if (end > 0)
      walk(all, s, column, o + (first_row * hv + h) * dv + mine + writes, hv * dv, writes < 2 && mine + writes < dv);
    EACH(i, ROWS) {
      EACH(j, 2) if (row(i) < dk && mine + j < dv) new_state[first + row(i) * dv + j] = s[i][j];
    }
  }
};

// y = norm * rms(o) * silu(z), a warp for each value head of each of `rows` tokens of all sequences.
struct delta_norm {
  static constexpr int THREADS = 256;
  static __device__ void run(const float* o, const void* proj, const float* norm, const bool* mask, const int* lengths,
                             void* y, int rows, int tokens, int hk, int hv, int dk, int dv, int dtype, float eps) {
    const Heads heads{hk, hv, dk, dv};
    const size_t unit = size_t(blockIdx.x) * (THREADS / 32) + warp_index(), row = unit / hv;
    const int h = int(unit % hv);
    wait_for_previous();
    if (row >= size_t(rows)) return;
    const bool there = int(row % tokens) < tokens_of(lengths, int(row / tokens), tokens), seen = !mask || mask[row];
    const float inverse = there ? inverse_rms(o + unit * dv, dv, eps) : 0.0f;
    for (int c = lane_index(); c < dv; c += 32) {
      const float z = seen ? load_number(proj, row * heads.width() + heads.channels() + h * dv + c, dtype) : 0.0f;
      store_number(y, unit * dv + c, dtype, there ? gated(o[unit * dv + c], inverse, norm[c], z) : 0.0f);
    }
  }
};

}  // namespace hm
