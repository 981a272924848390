// The delta rule and the gated norm of one token.
//
// Bytes: a head's state, f32[128, 128], is 64 KB; a block of 512 threads asks for all of it at once and keeps it in
// registers. A batch of 1 has 32 blocks, 2 MB in flight on the GPU; what bounds them is the 64 bytes a cycle that a
// multiprocessor takes in, 0.6 us for a head, and it is hidden: reads begin before the wait, while prepare runs. Four blocks
// a head would write 0.4 us faster, and have to join their sums of squares in one more launch, which costs more.
#pragma once
#include "gated_delta.cuh"

namespace hm {

// dk and dv up to 128, dv a multiple of 4. Blocks: (value heads of a key head, key heads, sequences). A warp has a
// chain's rows, a lane 4 columns of them. state and new_state may be the same array.
struct delta_step {
  static constexpr int THREADS = 512, BLOCKS = 2, MOST = 128, CHAINS = 16, ROWS = MOST / CHAINS;
  struct Shared {
    float2 kq[MOST];
    float v[MOST], z[MOST], norm[MOST], learnt[MOST], out[MOST], chains[CHAINS][MOST], gate[2];
  };

  // Row i of this warp's chain, and how far it is from the first.
  static __device__ int row(int i) { return int(warp_index()) / 2 * 4 + int(warp_index()) % 2 + steps(i); }
  static __device__ int steps(int i) { return i / 2 * 32 + i % 2 * 2; }

  // This thread's part of a state, rows of dv numbers that begin at p.
  static __device__ void load_state(const float* p, int dk, int dv, float (*s)[4]) {
    const int column = 4 * lane_index(), chain = row(0);
    p += chain * dv + column;
    EACH(i, ROWS) {
      const bool mine = chain + steps(i) < dk && column < dv;
      const float4 f = mine ? *reinterpret_cast<const float4*>(p) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      s[i][0] = f.x, s[i][1] = f.y, s[i][2] = f.z, s[i][3] = f.w;
      p += (steps(i + 1) - steps(i)) * dv;
    }
  }
  static __device__ void store_state(float* p, int dk, int dv, const float (*s)[4]) {
    const int column = 4 * lane_index(), chain = row(0);
    p += chain * dv + column;
    EACH(i, ROWS) {
      if (chain + steps(i) < dk && column < dv) *reinterpret_cast<float4*>(p) = make_float4(s[i][0], s[i][1], s[i][2], s[i][3]);
      p += (steps(i + 1) - steps(i)) * dv;
    }
  }

  // The block's chains, four columns from each thread, to the sums of columns: thread c has column c's.
  static __device__ float join(const float* four, Shared& at, int c) {
    *reinterpret_cast<float4*>(&at.chains[warp_index()][4 * lane_index()]) =
        make_float4(four[0], four[1], four[2], four[3]);
    __syncthreads();
    if (c >= MOST) return 0.0f;
    float half[2];
    EACH(i, 2) {
      float v[CHAINS / 2];
      EACH(j, CHAINS / 2) v[j] = at.chains[i * CHAINS / 2 + j][c];
      half[i] = pairwise_sum<CHAINS / 2>(v);
    }
    return half[0] + half[1];
  }

  // The state after the token, to `to`; at.out: S^T q.
  static __device__ void learn(float (*s)[4], Shared& at, float* to, int dk, int dv) {
    const int column = 4 * lane_index(), c = threadIdx.x;
    float four[4] = {};
    EACH(i, ROWS) {
      const float k = at.kq[row(i)].x;
      EACH(j, 4) four[j] = fmaf(s[i][j], k, four[j]);
    }
    const float sum = join(four, at, c);
    if (c < MOST) at.learnt[c] = yet_to_learn(at.v[c], sum, at.gate[0], at.gate[1]);
    __syncthreads();
    const float decay = at.gate[0];
    EACH(j, 4) four[j] = 0.0f;
    EACH(i, ROWS) {
      const float2 kq = at.kq[row(i)];
      EACH(j, 4) {
        s[i][j] = next_state(s[i][j], decay, at.learnt[column + j], kq.x);
        four[j] = fmaf(s[i][j], kq.y, four[j]);
      }
    }
    store_state(to, dk, dv, s);
    const float o = join(four, at, c);
    if (c < MOST) at.out[c] = o;
    __syncthreads();
  }

  static __device__ void run(const void* proj, const float* qkv, const float* gates, const float* norm,
                             const float* state, const bool* mask, const int* lengths, void* y, float* new_state,
                             int hk, int hv, int dk, int dv, int dtype, float eps) {
    const Heads heads{hk, hv, dk, dv};
    Shared& at = *shared_memory<Shared>();
    const int key = blockIdx.y, h = key * gridDim.x + blockIdx.x, b = blockIdx.z, head = b * hv + h, c = threadIdx.x;
    const size_t first = size_t(head) * dk * dv;
    // Before the wait: prepare writes none of this.
    float s[ROWS][4];
    load_state(state + first, dk, dv, s);
    const bool there = tokens_of(lengths, b, 1) > 0;
    if (c < dv) {
      const size_t gate = size_t(b) * heads.width() + heads.channels() + h * dv + c;
      at.z[c] = mask && !mask[b] ? 0.0f : load_number(proj, gate, dtype);
      at.norm[c] = norm[c];
    }
    wait_for_previous();
    if (there) {
      const float* q = qkv + size_t(b) * heads.channels() + key * dk;
      if (c < MOST) {
        at.kq[c] = c < dk ? make_float2(q[hk * dk + c], q[c]) : make_float2(0.0f, 0.0f);
        at.v[c] = c < dv ? qkv[size_t(b) * heads.channels() + 2 * hk * dk + h * dv + c] : 0.0f;
      }
      if (c < 2) at.gate[c] = gates[2 * head + c];
      __syncthreads();
      learn(s, at, new_state + first, dk, dv);
    } else {
      store_state(new_state + first, dk, dv, s);
    }
    if (c >= MOST) return;
    const float inverse = there ? inverse_rms(at.out, dv, eps) : 0.0f;
    if (c >= dv) return;
    const float v = there ? gated(at.out[c], inverse, at.norm[c], at.z[c]) : 0.0f;
    store_number(y, size_t(head) * dv + c, dtype, v);
  }
};

}  // namespace hm
