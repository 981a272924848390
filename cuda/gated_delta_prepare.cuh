// What the delta rule needs of each token: q, k and v through the convolution and silu, q and k of unit length, q divided
// by sqrt(dk); the state's decay and what share of the error it learns.
#pragma once
#include "gated_delta.cuh"

namespace hm {

// The convolution's input: token i of a sequence, before the call's first what the state remembers.
struct ConvInput {
  const void* proj;
  const float* state;  // of the sequence
  const bool* mask;    // of the sequence, or null
  size_t row;          // the sequence's first
  int width, taps, dtype;
  __device__ float at(int channel, int i) const {
    if (i < 0) return state[size_t(channel) * taps + taps + i];
    return mask && !mask[i] ? 0.0f : load_number(proj, (row + i) * width + channel, dtype);
  }
};

__device__ inline float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }  // torch's threshold

// Heads of up to 32 PIECES numbers, up to TAPS taps. Warps: (heads of q, k and v, tiles of tokens, sequences); tile is at
// least taps - 1 or all tokens, at most 32. The warp of a head's first tile also replaces the head's conv state, which may
// be the same array: it alone reads it.
template <int PIECES, int TAPS>
struct delta_prepare {
  static constexpr int THREADS = 128, BLOCKS = 16 / PIECES;

  // Of n channels from `channel` on; taps that are not there weigh 0.
  static __device__ void load_weights(const float* conv_weight, int channel, int n, int taps, float (*weight)[TAPS]) {
    const int missing = TAPS - taps;
    EACH(p, PIECES) {
      const int c = lane_index() + 32 * p;
      EACH(j, TAPS) weight[p][j] = c < n && j >= missing ? conv_weight[(channel + c) * taps + j - missing] : 0.0f;
    }
  }

  // y = silu(conv) of tokens first .. stop - 1; to length `length` where that is not 0.
  static __device__ void convolve(const ConvInput& input, const float (*weight)[TAPS], int channel, int n, int first,
                                  int stop, float length, float* y, int stride) {
    const int lane = lane_index(), missing = TAPS - input.taps;
    float window[PIECES][TAPS], newest[PIECES];  // one token ahead
    EACH(p, PIECES) {
      const int c = lane + 32 * p;
      const bool any = c < n && first < stop;
      EACH(j, TAPS - 1) window[p][j + 1] = any && j >= missing ? input.at(channel + c, first - TAPS + 1 + j) : 0.0f;
      newest[p] = any ? input.at(channel + c, first) : 0.0f;
    }
    for (int t = first; t < stop; t++) {
      float out[PIECES], square = 0.0f;
      EACH(p, PIECES) {
        const int c = lane + 32 * p;
        EACH(j, TAPS - 1) window[p][j] = window[p][j + 1];
        window[p][TAPS - 1] = newest[p];
        newest[p] = c < n && t + 1 < stop ? input.at(channel + c, t + 1) : 0.0f;
        float sum = 0.0f;
        EACH(j, TAPS) sum = fmaf(window[p][j], weight[p][j], sum);
        out[p] = silu(sum);
        square = fmaf(out[p], out[p], square);
      }
      float factor = 1.0f;
      if (length != 0.0f) factor = __fmul_rn(__frcp_rn(__fsqrt_rn(warp_sum(square) + 1e-6f)), length);
      EACH(p, PIECES) {
        const int c = lane + 32 * p;
        if (c < n) y[size_t(t) * stride + c] = __fmul_rn(out[p], factor);
      }
    }
  }

  static __device__ void run(const void* proj, const float* conv_weight, const float* a_log, const float* dt_bias,
                             const float* conv_state, const bool* mask, const int* lengths, float* qkv, float* gates,
                             float* new_conv_state, int tokens, int tile, int hk, int hv, int dk, int dv, int taps,
                             int dtype) {
    const Heads heads{hk, hv, dk, dv};
    const int head = blockIdx.x * (blockDim.x / 32) + warp_index(), first = blockIdx.y * tile, b = blockIdx.z;
    if (head >= 2 * hk + hv) return;
    const int h = head - 2 * hk, n = h < 0 ? dk : dv, channel = h < 0 ? head * dk : 2 * hk * dk + h * dv;
    const size_t row = size_t(b) * tokens, states = size_t(b) * heads.channels() * taps;
    const bool* shown = mask ? mask + row : nullptr;
    const ConvInput input{proj, conv_state + states, shown, row, heads.width(), taps, dtype};
    const float length = head < hk ? __frcp_rn(__fsqrt_rn(float(dk))) : h < 0 ? 1.0f : 0.0f;
    float weight[PIECES][TAPS];
    load_weights(conv_weight, channel, n, taps, weight);
    wait_for_previous();
    const int end = tokens_of(lengths, b, tokens), stop = min(end, first + tile);
    convolve(input, weight, channel, n, first, stop, length, qkv + row * heads.channels() + channel, heads.channels());
    const int t = first + lane_index();
    if (h >= 0 && t < stop) {
      const size_t at = (row + t) * heads.width() + heads.channels() + hv * dv + h;
      const bool seen = !shown || shown[t];
      const float learns = seen ? load_number(proj, at, dtype) : 0.0f;
      const float forgets = (seen ? load_number(proj, at + hv, dtype) : 0.0f) + dt_bias[h];
      float* gate = gates + ((row + t) * hv + h) * 2;
      gate[0] = expf(__fmul_rn(-expf(a_log[h]), softplus(forgets)));
      gate[1] = sigmoid(learns);
    }
    if (first > 0) return;
    for (int c = lane_index(); c < n; c += 32) {
      for (int j = 0; j < taps; j++)  // upwards: an older input's place is read before it is taken
        new_conv_state[states + size_t(channel + c) * taps + j] = input.at(channel + c, end - taps + j);
    }
  }
};

}  // namespace hm
