// One Gated DeltaNet layer between its projections, token by token (arXiv 2412.06464, equation 10):
//
//   q, k, v = silu(causal conv(proj)), q and k to unit length, q / sqrt(dk)
//   S = e^g S + k (beta (v - (e^g S)^T k))^T,   g = -e^a_log softplus(a + dt_bias),  beta = sigmoid(b)
//   y = norm * rms(S^T q) * silu(z)
//
// Where the time goes: S is f32[dk, dv] = 64 KB a head, 2 MB a layer; one token reads and writes all of
// it and does 4 multiply-adds a number, so a step runs at the speed of memory. Two kernels:
//
//   gated_delta_conv   unit = (sequence, head of q, k or v): its channels over all tokens of a chunk
//   gated_delta_rule   unit = (sequence, value head): a slice of S stays in cache over the chunk
//
//        dv: |V vectors|V vectors|...    pass 1: S^T k down the column  (reads the slice)
//     dk  |  |  slice  |         |       pass 2: S updated, S^T q       (finds it in cache)
//
// A column of S sees the same operations in the same order whatever the slice, the chunk or the thread:
// a prompt in one call and the same tokens one by one give the same bits.
#pragma once

namespace hm {
namespace {

constexpr int kPackedRows = 128;  // of S: 16 or 32 KB of a slice in the first-level cache
constexpr int kStrip = 128;  // channels convolved together: window and weights of 4 taps are 4 KB

// Tokens of the chunk that sequence b has.
inline int64_t tokens_of(const GatedDeltaTask& t, int64_t b) {
  if (!t.counts) return t.count;
  if (t.counts[b] <= t.first) return 0;
  const int64_t left = t.counts[b] - t.first;
  return left < t.count ? left : t.count;
}

inline int whole_vectors(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Storage keeps the taps of a channel together, vectors want channels: rows[j][i] = columns[i][j] and back.
template <int Taps>
inline void to_rows(const float* columns, float (*rows)[kStrip], int n, int taps) {
  if (Taps) taps = Taps;  // known to the compiler, the loops become shuffles
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < taps; ++j) rows[j][i] = columns[i * taps + j];
  for (int i = n; i < whole_vectors(n); ++i)
    for (int j = 0; j < taps; ++j) rows[j][i] = 0;
}
template <int Taps>
inline void to_columns(const float* const* rows, float* columns, int n, int taps) {
  if (Taps) taps = Taps;
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < taps; ++j) columns[i * taps + j] = rows[j][i];
}

// x f32[count, n] (row stride `stride`): channels first.. of sequence b, convolved; the state moves on.
template <int Taps>
void conv_strip(const GatedDeltaTask& t, int64_t b, int64_t count, int64_t first, int n, float* x, int64_t stride) {
  const int taps = Taps ? Taps : t.taps, width = whole_vectors(n), bytes = t.proj_dtype == hm_f32 ? 4 : 2;
  alignas(64) float weight[kMostTaps][kStrip], window[kMostTaps][kStrip], out[kStrip];
  float* state = t.conv_state + (b * t.channels + first) * taps;
  to_rows<Taps>(t.conv_weight + first * taps, weight, n, taps);
  to_rows<Taps>(state, window, n, taps);
  float* rows[kMostTaps];  // of the window, oldest first
  for (int j = 0; j < taps; ++j) rows[j] = window[j];
  const char* proj = static_cast<const char*>(t.proj) + ((b * t.tokens + t.first) * t.proj_width + first) * bytes;
  for (int64_t i = 0; i < count; ++i) {
    float* newest = rows[0];
    for (int j = 0; j + 1 < taps; ++j) rows[j] = rows[j + 1];
    rows[taps - 1] = newest;
    widen(proj + i * t.proj_width * bytes, newest, n, Dtype(t.proj_dtype));
    for (int c = 0; c < width; c += kLanes) {
      Vec sum = mul(load(rows[0] + c), load(weight[0] + c));
      for (int j = 1; j < taps; ++j) sum = fma(load(rows[j] + c), load(weight[j] + c), sum);
      store(out + c, silu(sum));
    }
    memcpy(x + i * stride, out, size_t(n) * 4);
  }
  to_columns<Taps>(rows, state, n, taps);
}

// Units: sequences times heads, those of q, then k, then v.
void gated_delta_conv(const GatedDeltaTask& t, int64_t begin, int64_t end) {
  const int64_t heads = 2 * t.hk + t.hv;
  for (int64_t u = begin; u < end; ++u) {
    const int64_t b = u / heads, head = u % heads, count = tokens_of(t, b);
    const bool value = head >= 2 * t.hk;
    const int64_t n = value ? t.dv : t.dk;
    const int64_t first = value ? 2 * t.hk * t.dk + (head - 2 * t.hk) * t.dv : head * t.dk;
    float* x = t.qkv + b * t.count * t.channels + first;
    for (int64_t c = 0; c < n; c += kStrip) {
      const int strip = n - c < kStrip ? int(n - c) : kStrip;
      if (t.taps == 4)
        conv_strip<4>(t, b, count, first + c, strip, x + c, t.channels);
      else
        conv_strip<0>(t, b, count, first + c, strip, x + c, t.channels);
    }
    if (value) continue;
    const float scale = head < t.hk ? float(1.0 / sqrt(double(t.dk))) : 1.0f;
    for (int64_t i = 0; i < count; ++i) {
      float* row = x + i * t.channels;
      const float inverse = 1.0f / sqrtf(sum_of_squares(row, n) + 1e-6f);
      for (int64_t c = 0; c < n; ++c) row[c] = row[c] * inverse * scale;
    }
  }
}

struct Gates {
  float decay, beta;
};

inline Gates gates(const GatedDeltaTask& t, int64_t row, int64_t h) {
  const int64_t at = row * t.proj_width + t.channels + t.hv * t.dv + h;
  const float b = load1(t.proj, at, Dtype(t.proj_dtype));
  const float a = load1(t.proj, at + t.hv, Dtype(t.proj_dtype)) + t.dt_bias[h];
  const float softplus = a > 20.0f ? a : log1pf(expf(a));  // torch's threshold
  return {expf(-expf(t.a_log[h]) * softplus), 1.0f / (1.0f + expf(-b))};
}

// One token on V vectors of columns, the last of them n lanes wide where Tail: v becomes S^T q.
template <int V, bool Tail>
inline void step(float* s, int64_t stride, int64_t dk, const float* q, const float* k, float* v, Gates g, int n) {
  const auto get = [n](const float* p) { return Tail ? load_n(p, n) : load(p); };
  const auto put = [n](float* p, Vec x) { return Tail ? store_n(p, x, n) : store(p, x); };
  const Vec decay = splat(g.decay), beta = splat(g.beta);
  Vec kv[V], out[V];
#pragma GCC unroll 8
  for (int j = 0; j < V; ++j) kv[j] = out[j] = zero();
  for (int64_t i = 0; i < dk; ++i) {
    const Vec ki = splat(k[i]);
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) kv[j] = fma(get(s + i * stride + j * kLanes), ki, kv[j]);
  }
  // kv becomes what the state has yet to learn of v
#pragma GCC unroll 8
  for (int j = 0; j < V; ++j) kv[j] = mul(sub(get(v + j * kLanes), mul(kv[j], decay)), beta);
  for (int64_t i = 0; i < dk; ++i) {
    const Vec ki = splat(k[i]), qi = splat(q[i]);
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) {
      float* p = s + i * stride + j * kLanes;
      const Vec next = fma(kv[j], ki, mul(get(p), decay));
      put(p, next);
      out[j] = fma(next, qi, out[j]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < V; ++j) put(v + j * kLanes, out[j]);
}

// All tokens of the sequence in the chunk on columns column.. of S; `s` is where the first of them is kept.
template <int V, bool Tail>
inline void walk(const GatedDeltaTask& t, float* s, int64_t stride, int64_t b, int64_t h, int64_t column,
                 const Gates* g, int n) {
  const int64_t key = h / (t.hv / t.hk), count = tokens_of(t, b);
  for (int64_t i = 0; i < count; ++i) {
    float* x = t.qkv + (b * t.count + i) * t.channels;
    const float *q = x + key * t.dk, *k = q + t.hk * t.dk;
    step<V, Tail>(s, stride, t.dk, q, k, x + 2 * t.hk * t.dk + h * t.dv + column, g[i], n);
  }
}

template <int V, bool Tail = false>
void slice(const GatedDeltaTask& t, float* s, int64_t b, int64_t h, int64_t column, const Gates* g, int n = kLanes) {
  if (Tail || t.count == 1 || t.dk > kPackedRows) return walk<V, Tail>(t, s + column, t.dv, b, h, column, g, n);
  // Rows a power of two apart share few sets of the cache: several tokens work on a compact copy.
  alignas(64) float packed[kPackedRows * V * kLanes];
  constexpr int width = V * kLanes;
  for (int64_t i = 0; i < t.dk; ++i) memcpy(packed + i * width, s + i * t.dv + column, width * 4);
  walk<V, Tail>(t, packed, width, b, h, column, g, n);
  for (int64_t i = 0; i < t.dk; ++i) memcpy(s + i * t.dv + column, packed + i * width, width * 4);
}

// y = norm * rms(o) * silu(z) for one head of one token.
inline void gated_norm(const GatedDeltaTask& t, const float* o, int64_t row, int64_t h) {
  const float mean = sum_of_squares(o, t.dv) / float(t.dv);
  const Vec inverse = splat(1.0f / sqrtf(mean + t.eps));
  const int bytes = t.proj_dtype == hm_f32 ? 4 : 2, y_bytes = t.y_dtype == hm_f32 ? 4 : 2;
  const char* z = static_cast<const char*>(t.proj) + (row * t.proj_width + t.channels + h * t.dv) * bytes;
  char* y = static_cast<char*>(t.y) + (row * t.hv + h) * t.dv * y_bytes;
  alignas(64) float gate[kStrip] = {};
  for (int64_t c = 0; c < t.dv; c += kStrip) {
    const int n = t.dv - c < kStrip ? int(t.dv - c) : kStrip;
    widen(z + c * bytes, gate, n, Dtype(t.proj_dtype));
    for (int i = 0; i < n; i += kLanes) {
      const int lanes = n - i < kLanes ? n - i : kLanes;
      const Vec normed = mul(load_n(t.norm + c + i, lanes), mul(load_n(o + c + i, lanes), inverse));
      store(gate + i, mul(normed, silu(load(gate + i))));
    }
    narrow(gate, y + c * y_bytes, n, Dtype(t.y_dtype));
  }
}

inline void no_output(const GatedDeltaTask& t, int64_t row, int64_t h) {
  const int64_t bytes = t.dv * (t.y_dtype == hm_f32 ? 4 : 2);
  memset(static_cast<char*>(t.y) + (row * t.hv + h) * bytes, 0, size_t(bytes));
}

// Units: sequences times value heads.
void gated_delta_rule(const GatedDeltaTask& t, int64_t begin, int64_t end) {
  Gates g[kMostTokens];
  for (int64_t u = begin; u < end; ++u) {
    const int64_t b = u / t.hv, h = u % t.hv, row = b * t.tokens + t.first, count = tokens_of(t, b);
    for (int64_t i = count; i < t.count; ++i) no_output(t, row + i, h);
    if (!count) continue;
    for (int64_t i = 0; i < count; ++i) g[i] = gates(t, row + i, h);
    float* s = t.state + u * t.dk * t.dv;
    int64_t c = 0;
    // One token streams whole rows of S from memory; several keep a slice in the first-level cache.
    if (t.count == 1)
      for (; kLanes == 16 && c + 8 * kLanes <= t.dv; c += 8 * kLanes) slice<8>(t, s, b, h, c, g);
    for (; c + 4 * kLanes <= t.dv; c += 4 * kLanes) slice<4>(t, s, b, h, c, g);
    for (; c + kLanes <= t.dv; c += kLanes) slice<1>(t, s, b, h, c, g);
    if (c < t.dv) slice<1, true>(t, s, b, h, c, g, int(t.dv - c));
    for (int64_t i = 0; i < count; ++i) {
      const float* o = t.qkv + (b * t.count + i) * t.channels + 2 * t.hk * t.dk + h * t.dv;
      gated_norm(t, o, row + i, h);
    }
  }
}

}  // namespace
}  // namespace hm
