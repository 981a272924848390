// One Gated DeltaNet layer between its projections. Meaning: reference.gated_delta.
//
//   prepare   conv, silu, unit length, gates     a warp: one head of q, k or v, some tokens
//   step      one token's rule and norm          a block: one value head, its state in registers
//   scan      many tokens' rule, in order        a warp: 8 columns of a value head's state, in registers
//   norm      many tokens' norm                  a warp: one value head of one token
//
// A token alone takes prepare and step, more take prepare, scan and norm. What is in this file is all the arithmetic of
// step, scan and norm, and each sum has one order, so a prompt has the same bits in one call, cut anywhere and token by
// token; no product is added but by fmaf, so a compiler has nothing to contract. A sum down a column of the state is 16
// chains of fused multiply-adds: chain 2 g + p takes the rows r, upwards, with r / 4 % 8 == g and r % 2 == p. Chains are
// added pairwise, neighbours first.
//
// prepare is a launch of its own for one token too: value heads share q and k, and a block of one of them could not
// replace their conv states while a block of another still reads them.
#pragma once
#include "number.cuh"

namespace hm {

struct Heads {
  int hk, hv, dk, dv;
  __device__ int channels() const { return 2 * hk * dk + hv * dv; }
  __device__ int width() const { return channels() + hv * dv + 2 * hv; }  // of a row of proj: qkv | z | b | a
};

// Tokens of sequence b: those behind are not there.
__device__ inline int tokens_of(const int* lengths, int b, int tokens) {
  return lengths ? max(0, min(lengths[b], tokens)) : tokens;
}

__device__ inline float sigmoid(float x) { return __frcp_rn(__fadd_rn(1.0f, expf(-x))); }
__device__ inline float silu(float x) { return __fmul_rn(x, sigmoid(x)); }

// Pairs, then pairs of pairs; v is used up.
template <int N>
__device__ inline float pairwise_sum(float* v) {
  HM_UNROLL for (int h = 1; h < N; h *= 2) {
    HM_UNROLL for (int i = 0; i + h < N; i += 2 * h) v[i] += v[i + h];
  }
  return v[0];
}

// What a column has yet to learn of v. seen: S^T k before the decay.
__device__ inline float yet_to_learn(float v, float seen, float decay, float beta) {
  return __fmul_rn(fmaf(-seen, decay, v), beta);
}
__device__ inline float next_state(float s, float decay, float learnt, float k) {
  return fmaf(learnt, k, __fmul_rn(s, decay));
}

// 1 / rms of a head's o[0..n), by a whole warp.
__device__ inline float inverse_rms(const float* o, int n, float eps) {
  float square = 0.0f;
  for (int c = lane_index(); c < n; c += 32) square = fmaf(o[c], o[c], square);
  return __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(warp_sum(square), float(n)), eps)));
}
__device__ inline float gated(float o, float inverse, float norm, float z) {
  return __fmul_rn(__fmul_rn(norm, __fmul_rn(o, inverse)), silu(z));
}

}  // namespace hm
