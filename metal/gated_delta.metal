// One Gated DeltaNet layer between its projections, token by token. Meaning: reference.gated_delta.
//
// A threadgroup has one value head of one sequence. Its state S, f32[DK, DV], stays in registers over all
// tokens: thread (g, c) keeps VEC columns from VEC c on of the rows g, g + G, ... so that 128 columns are
// read and written 512 bytes at a time. Sums over rows are joined in threadgroup memory, in one order:
// a prompt in one call and its tokens one by one give the same bits.
#include "group_sum.metal"

namespace hm {

METAL_FUNC float sigmoid(float x) { return 1.0f / (1.0f + precise::exp(-x)); }
METAL_FUNC float softplus(float x) {
  if (x > 20.0f) return x;  // torch's threshold
  const float e = precise::exp(x), u = 1.0f + e;
  return u == 1.0f ? e : precise::log(u) * (e / (u - 1.0f));  // log(1 + e) without losing a small e
}

// The convolution's input i steps after the call's first token; before it, what the state remembers.
template <int TAPS, class Proj, class Conv, class Mask>
METAL_FUNC float conv_input(Proj proj, ulong width, Conv conv, Mask mask, int i) {
  if (i < 0) return conv[TAPS + i];
  return mask && !mask[i] ? 0.0f : float(proj[ulong(i) * width]);
}

// Sums of squares of x[0..N) and of as many behind them, the same in every thread.
template <int N, int THREADS>
METAL_FUNC float2 group_squares(const threadgroup float* x, threadgroup float2* partial, Place at) {
  float2 sum = 0.0f;
  for (int i = at.index; i < N; i += THREADS) sum = fma(float2(x[i], x[N + i]), float2(x[i], x[N + i]), sum);
  return group_sum(sum, partial, THREADS / 32, at);
}

// Sums of the G threads of a column, in order, for each of them.
template <int G, int DV, int VEC>
METAL_FUNC void join(thread float* sums, threadgroup float* joined, int g, int column, bool active) {
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the last sums have been read
  if (active)
    for (int j = 0; j < VEC; j++) joined[g * DV + column + j] = sums[j];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int j = 0; active && j < VEC; j++) {
    sums[j] = joined[column + j];
    for (int i = 1; i < G; i++) sums[j] += joined[i * DV + column + j];
  }
}

// y[b, t, HV DV], new_conv, new_state. proj [b, t, qkv | z | b | a]; mask [b, t] (false: a token's projections
// are 0) and lengths [b] (tokens behind it leave the states as they are, their y is 0) may be null; dims: t.
template <int HK, int HV, int DK, int DV, int TAPS, int THREADS, int EPS, class Proj, class Weight, class Head,
          class Norm, class Conv, class State, class Mask, class Lengths, class Dims, class Y>
METAL_FUNC void gated_delta(Proj all_proj, Weight conv_weight, Head a_log, Head dt_bias, Norm norm, Conv all_conv,
                            State all_state, Mask all_mask, Lengths lengths, Dims dims, device Y* y,
                            device float* new_conv, device float* new_state, threadgroup float* q,
                            threadgroup float2* partial, Place at) {
  constexpr int VEC = DV % 4 == 0 ? 4 : 1, COLUMNS = DV / VEC, G = THREADS / COLUMNS, ROWS = (DK + G - 1) / G;
  constexpr int KEYS = HK * DK, CHANNELS = 2 * KEYS + HV * DV, WIDTH = CHANNELS + HV * DV + 2 * HV, EACH = HV / HK;
  threadgroup float *k = q + DK, *v = k + DK, *joined = v + DV;
  const int b = at.group.y, h = at.group.x, tokens = dims[0], end = lengths ? min(int(lengths[b]), tokens) : tokens;
  const auto proj = all_proj + ulong(b) * tokens * WIDTH;
  const auto conv = all_conv + ulong(b) * CHANNELS * TAPS;
  const auto mask = all_mask ? all_mask + ulong(b) * tokens : all_mask;
  const ulong place = (ulong(b) * HV + h) * DK * DV;

  const int g = at.index / COLUMNS, column = at.index % COLUMNS * VEC;
  const bool active = g < G;
  float s[ROWS][VEC];
  for (int i = 0; i < ROWS; i++) {
    const bool mine = active && g + i * G < DK;
    for (int j = 0; j < VEC; j++) s[i][j] = mine ? all_state[place + (g + i * G) * DV + column + j] : 0.0f;
  }
  for (int t = 0; t < end; t++) {
    const ulong row = ulong(t) * WIDTH;
    for (int c = at.index; c < 2 * DK + DV; c += THREADS) {  // q, k, v of this head
      const int channel = c < DK ? h / EACH * DK + c : c < 2 * DK ? KEYS + h / EACH * DK + c - DK : 2 * KEYS + h * DV + c - 2 * DK;
      float sum = 0.0f;
      for (int j = 0; j < TAPS; j++) {
        const float x = conv_input<TAPS>(proj + channel, WIDTH, conv + channel * TAPS, mask, t - TAPS + 1 + j);
        sum = fma(x, float(conv_weight[channel * TAPS + j]), sum);
      }
      q[c] = sum * sigmoid(sum);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const float2 squares = group_squares<DK, THREADS>(q, partial, at);
    const float q_unit = 1.0f / precise::sqrt(squares.x + 1e-6f) * (1.0f / precise::sqrt(float(DK)));
    const float k_unit = 1.0f / precise::sqrt(squares.y + 1e-6f);
    const bool seen = !mask || mask[t];
    const ulong gates = row + CHANNELS + HV * DV + h;
    const float beta = sigmoid(seen ? float(proj[gates]) : 0.0f);
    const float a = (seen ? float(proj[gates + HV]) : 0.0f) + float(dt_bias[h]);
    const float decay = precise::exp(-precise::exp(float(a_log[h])) * softplus(a));

    float sums[VEC] = {};
    for (int i = 0; i < ROWS; i++) {
      const float ki = g + i * G < DK ? k[g + i * G] * k_unit : 0.0f;
      for (int j = 0; j < VEC; j++) sums[j] = fma(s[i][j], ki, sums[j]);
    }
    join<G, DV, VEC>(sums, joined, g, column, active);
    float out[VEC] = {};
    for (int j = 0; j < VEC; j++) sums[j] = active ? (v[column + j] - sums[j] * decay) * beta : 0.0f;  // yet to learn
    for (int i = 0; i < ROWS; i++) {
      const bool mine = g + i * G < DK;
      const float ki = mine ? k[g + i * G] * k_unit : 0.0f, qi = mine ? q[g + i * G] * q_unit : 0.0f;
      for (int j = 0; j < VEC; j++) {
        s[i][j] = fma(sums[j], ki, s[i][j] * decay);
        out[j] = fma(s[i][j], qi, out[j]);
      }
    }
    join<G, DV, VEC>(out, joined, g, column, active);
    if (active && g == 0)
      for (int j = 0; j < VEC; j++) v[column + j] = out[j];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float square = 0.0f;
    for (int c = at.index; c < DV; c += THREADS) square = fma(v[c], v[c], square);
    square = group_sum(square, (threadgroup float*)partial, THREADS / 32, at);
    const float rms = 1.0f / precise::sqrt(square / float(DV) + as_type<float>(EPS));
    for (int c = at.index; c < DV; c += THREADS) {
      const float z = seen ? float(proj[row + CHANNELS + h * DV + c]) : 0.0f;
      y[((ulong(b) * tokens + t) * HV + h) * DV + c] = Y(float(norm[c]) * (v[c] * rms) * (z * sigmoid(z)));
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  for (int c = at.index; c < (tokens - end) * DV; c += THREADS)
    y[((ulong(b) * tokens + end + c / DV) * HV + h) * DV + c % DV] = Y(0.0f);
  for (int i = 0; i < ROWS; i++) {
    if (!active || g + i * G >= DK) continue;
    for (int j = 0; j < VEC; j++) new_state[place + (g + i * G) * DV + column + j] = s[i][j];
  }
  const int shared = h % EACH == 0 ? 2 * DK : 0;  // one of the heads that share q and k writes their channels
  for (int c = at.index; c < (shared + DV) * TAPS; c += THREADS) {
    const int i = c / TAPS;
    const int channel = i < shared ? (i < DK ? h / EACH * DK + i : KEYS + h / EACH * DK + i - DK) : 2 * KEYS + h * DV + i - shared;
    const float x = conv_input<TAPS>(proj + channel, WIDTH, conv + channel * TAPS, mask, end - TAPS + c % TAPS);
    new_conv[(ulong(b) * CHANNELS + channel) * TAPS + c % TAPS] = x;
  }
}

}  // namespace hm
