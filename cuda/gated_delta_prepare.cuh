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

// Heads of up to 32 PIECES numbers, up to TAPS taps. Warps: (heads of q, k and v, then 32 value heads' gates at a time;
// tiles of tokens; sequences). tile is at least taps - 1 or all tokens. The warp of a head's first tile also replaces the
// head's conv state, which may be the same array: it alone reads it.
template <int PIECES, int TAPS>
struct delta_prepare {
  static constexpr int THREADS = 128, BLOCKS = 16 / PIECES;
  static constexpr int AHEAD = PIECES > 4 ? 1 : 3;  // tokens on their way while one is convolved
  static constexpr int WINDOW = TAPS + AHEAD;

  // A head's channels, from `channel` on; taps that are not there weigh 0.
  static __device__ void load_weights(const float* conv_weight, int channel, int n, int taps, float (*weight)[TAPS]) {
    const int missing = TAPS - taps;
    EACH(p, PIECES) {
      const int c = lane_index() + 32 * p;
      EACH(j, TAPS) weight[p][j] = c < n && j >= missing ? conv_weight[(channel + c) * taps + j - missing] : 0.0f;
    }
  }
  // The TAPS inputs before token t and the AHEAD from t on, of tokens before stop.
  static __device__ void load_window(const ConvInput& input, int channel, int n, int t, int stop,
                                     float (*window)[WINDOW]) {
    EACH(p, PIECES) {
      const int c = lane_index() + 32 * p;
      EACH(j, WINDOW) {
        const bool there = j < TAPS ? j >= TAPS - input.taps : t - TAPS + j < stop;
        window[p][j] = c < n && there ? input.at(channel + c, t - TAPS + j) : 0.0f;
      }
    }
  }

  // y = silu(conv) of tokens first .. stop - 1; to length `length` where that is not 0. The window moves from first to stop.
  static __device__ void convolve(const ConvInput& input, const float (*weight)[TAPS], float (*window)[WINDOW],
                                  int channel, int n, int first, int stop, float length, float* y, int stride) {
    load_window(input, channel, n, first, stop, window);
    for (int t = first; t < stop; t++) {
      float out[PIECES], square = 0.0f;
      EACH(p, PIECES) {
        const int c = lane_index() + 32 * p;
        EACH(j, WINDOW - 1) window[p][j] = window[p][j + 1];
        window[p][WINDOW - 1] = c < n && t + AHEAD < stop ? input.at(channel + c, t + AHEAD) : 0.0f;
        float sum = 0.0f;
        EACH(j, TAPS) sum = fmaf(window[p][j], weight[p][j], sum);
        out[p] = silu(sum);
        square = fmaf(out[p], out[p], square);
      }
      float factor = 1.0f;
      if (length != 0.0f) factor = __fmul_rn(__frcp_rn(__fsqrt_rn(warp_sum(square) + 1e-6f)), length);
      EACH(p, PIECES) {
        const int c = lane_index() + 32 * p;
        if (c < n) y[size_t(t) * stride + c] = __fmul_rn(out[p], factor);
      }
    }
  }

  // decay and beta of the value heads h of this warp's lanes.
  static __device__ void make_gates(const ConvInput& input, const Heads& heads, const float* a_log, const float* dt_bias,
                                    float* gates, int h, int first, int stop) {
    if (h >= heads.hv) return;
    const float rate = expf(a_log[h]), bias = dt_bias[h];
    const int column = heads.channels() + heads.hv * heads.dv + h;
    for (int t = first; t < stop; t++) {
      const float learns = input.at(column, t), forgets = input.at(column + heads.hv, t) + bias;
      float2* gate = reinterpret_cast<float2*>(gates) + (input.row + t) * heads.hv + h;
      *gate = make_float2(expf(__fmul_rn(-rate, softplus(forgets))), sigmoid(learns));
    }
  }

  static __device__ void run(const void* proj, const float* conv_weight, const float* a_log, const float* dt_bias,
                             const float* conv_state, const bool* mask, const int* lengths, float* qkv, float* gates,
                             float* new_conv_state, int tokens, int tile, int hk, int hv, int dk, int dv, int taps,
                             int dtype) {
    const Heads heads{hk, hv, dk, dv};
    const int head = blockIdx.x * (blockDim.x / 32) + warp_index(), first = blockIdx.y * tile, b = blockIdx.z;
    const int h = head - 2 * hk, n = h >= hv ? 0 : h < 0 ? dk : dv, channel = h < 0 ? head * dk : 2 * hk * dk + h * dv;
    const size_t row = size_t(b) * tokens, states = (size_t(b) * heads.channels() + channel) * taps;
    const ConvInput input{proj,         conv_state + size_t(b) * heads.channels() * taps,
                          mask ? mask + row : nullptr, row, heads.width(), taps, dtype};
    float weight[PIECES][TAPS], window[PIECES][WINDOW];
    load_weights(conv_weight, channel, n, taps, weight);
    wait_for_previous();
    const int end = tokens_of(lengths, b, tokens), stop = min(end, first + tile);
    if (h >= hv) return make_gates(input, heads, a_log, dt_bias, gates, 32 * (h - hv) + lane_index(), first, stop);
    const float length = head < hk ? __frcp_rn(__fsqrt_rn(float(dk))) : h < 0 ? 1.0f : 0.0f;
    convolve(input, weight, window, channel, n, first, stop, length, qkv + row * heads.channels() + channel,
             heads.channels());
    if (first > 0) return;
    if (stop < end) load_window(input, channel, n, end, end, window);
    EACH(p, PIECES) {
      const int c = lane_index() + 32 * p;
      EACH(j, TAPS) {
        const int i = j - (TAPS - taps);
        if (c < n && i >= 0) new_conv_state[states + c * taps + i] = window[p][j];
      }
    }
  }
};

}  // namespace hm
