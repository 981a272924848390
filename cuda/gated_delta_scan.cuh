// The delta rule of many tokens, in order, and their gated norm.
//
// A warp walks all tokens with 8 columns of a head's state in registers: lane (g, c) has rows 4 g .. 4 g + 3 of each 16 of
// column c, four chains, so a sum down a column is two additions in a lane and two shuffles, with no barrier. Four warps
// share the q, k and v that cp.async brings 8 to 16 tokens ahead; they meet once in 8 tokens. 32 heads of 128 columns are
// 512 warps in 128 blocks: one for each scheduler of an H200's 132 multiprocessors.
//
// Cycles of a token (128 rows), one warp a scheduler: 128 f32 instructions (S k, S q of the token before, decay, update:
// 32 each), 18 loads from shared memory, 4 shuffles, ~20 others: ~170 to issue. The chain from token to token is
// 32 + 4 (S k) + 8 (pairs) + 2 * 27 (shuffles) + 8 (what to learn) + 32 (update) = ~140, and S q, decay and loads, which
// do not depend on it, fill its gaps. At 170 to 200 cycles and 1.75 GHz 4,096 tokens take 0.40 to 0.47 ms a layer, 12 to
// 14 ms in 30 layers; f32 instructions alone (4 a number of the state: 4096 * 32 * 128 * 128 * 4 / (132 * 128)) 0.29 ms.
// The chunked form (64 tokens as matrices, arXiv 2412.06464) needs 2 (4 C^2 d + 3 C d^2) operations a chunk and head, at
// C = 64, d = 128 10.5 M: 21 G a layer, 10.7 G multiply-adds = 0.36 ms in f32, no less than the scan's. It wins only on
// tensor cores in 16 bits, which would not be f32's result, nor the same for a prompt cut elsewhere.
#pragma once
#include "gated_delta.cuh"

namespace hm {

// dk up to 4 ROWS. Blocks: (32 columns, value heads, sequences). state and new_state may be the same array.
template <int ROWS>
struct delta_scan {
  static constexpr int THREADS = 128, COLUMNS = 32, DK = 4 * ROWS, TOKENS = 256 / ROWS;
  static constexpr int STRIDE = 2 * DK + COLUMNS + 4;  // floats of a token: q, k, v, decay, beta
  static constexpr int SHARED = 4 * 3 * TOKENS * STRIDE;  // bytes: TOKENS in use, as many next, as many on their way

  static __device__ void copy(float* to, const float* from, int n, bool fours) {
    if (fours) {
      for (int i = 4 * lane_index(); i < n; i += 128) copy_async<16>(to + i, from + i);
    } else {
      for (int i = lane_index(); i < n; i += 32) copy_async<4>(to + i, from + i);
    }
  }
  static __device__ void load_rows(const float* from, float* v) {
    EACH(j, ROWS / 4) {
      const float4 f = *reinterpret_cast<const float4*>(from + 16 * j + lane_index() / 8 * 4);
      v[4 * j] = f.x, v[4 * j + 1] = f.y, v[4 * j + 2] = f.z, v[4 * j + 3] = f.w;
    }
  }
  // The sum down each column of s times x, in all lanes that have the column.
  static __device__ float down(const float* s, const float* x) {
    float chain[4] = {};
    EACH(i, ROWS) chain[i % 4] = fmaf(s[i], x[i], chain[i % 4]);
    float sum = pairwise_sum<4>(chain);
    sum += __shfl_xor_sync(FULL, sum, 8);
    return sum + __shfl_xor_sync(FULL, sum, 16);
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

  // s after all tokens; o: the column's, rows apart.
  static __device__ void walk(const Tokens& tokens, float* s, int column, float* o, int stride, bool writes) {
    float k[ROWS], q[ROWS];
    const float *token = tokens.ring, *last = tokens.ring + (3 * TOKENS - 1) * STRIDE;
    load_rows(token + DK, k);
    EACH(i, ROWS) q[i] = 0.0f;
    float v = token[2 * DK + column];
    float2 gate = *reinterpret_cast<const float2*>(token + 2 * DK + COLUMNS);
    for (int first = 0; first < tokens.end; first += TOKENS) {
      tokens.fetch(first + 2 * TOKENS);
      for (int t = first; t < min(first + TOKENS, tokens.end); t++) {
        const float sum = down(s, k), out = down(s, q);  // of this token, of the one before
        if (writes && t > 0) o[size_t(t - 1) * stride] = out;
        const float learnt = yet_to_learn(v, sum, gate.x, gate.y);
        load_rows(token, q);
        EACH(i, ROWS) s[i] = next_state(s[i], gate.x, learnt, k[i]);
        token = token == last ? tokens.ring : token + STRIDE;
        load_rows(token + DK, k);
        v = token[2 * DK + column];
        gate = *reinterpret_cast<const float2*>(token + 2 * DK + COLUMNS);
      }
      copies_wait();
      __syncthreads();
    }
    const float out = down(s, q);
    if (writes) o[size_t(tokens.end - 1) * stride] = out;
  }

  static __device__ void run(const float* qkv, const float* gates, const float* state, const int* lengths, float* o,
                             float* new_state, int tokens, int hk, int hv, int dk, int dv) {
    const Heads heads{hk, hv, dk, dv};
    const int begin = blockIdx.x * COLUMNS, h = blockIdx.y, b = blockIdx.z, key = h / (hv / hk) * dk;
    const int mine = 8 * warp_index() + lane_index() % 8, column = begin + mine, above = lane_index() / 8 * 4;
    const size_t row = size_t(b) * tokens, first = (size_t(b) * hv + h) * dk * dv + column;
    float s[ROWS], *ring = shared_memory<float>();
    EACH(i, ROWS) {  // before the wait: prepare does not write it
      const int r = i / 4 * 16 + above + i % 4;
      s[i] = r < dk && column < dv ? state[first + size_t(r) * dv] : 0.0f;
    }
    for (int i = threadIdx.x; i < SHARED / 4; i += THREADS) ring[i] = 0.0f;  // rows that are not there stay 0
    __syncthreads();
    wait_for_previous();
    const int end = tokens_of(lengths, b, tokens);
    const float* from = qkv + row * heads.channels();
    const Tokens all{from + key, from + hk * dk + key, from + 2 * hk * dk + h * dv + begin, gates + (row * hv + h) * 2,
                     ring, heads.channels(), hv, dk, min(COLUMNS, dv - begin), end, (dk | dv) % 4 == 0};
    all.fetch(0);
    all.fetch(TOKENS);
    copies_wait();
    __syncthreads();
    const bool writes = above == 0 && column < dv;
    if (end > 0) walk(all, s, mine, o + (row * hv + h) * dv + column, hv * dv, writes);
    EACH(i, ROWS) {
      const int r = i / 4 * 16 + above + i % 4;
      if (r < dk && column < dv) new_state[first + size_t(r) * dv] = s[i];
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
