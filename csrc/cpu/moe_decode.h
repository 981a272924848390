// The parts of a mixture-of-experts block that are not a product with a weight:
//
//   route     p = softmax(logits[t, :]);  the top_k largest, the lower expert first among equals; p / sum(p)
//   if asked swiglu    h[r, i] = silu(gate[r, i]) * up[r, i], gate and up side by side in a row of 2 * width
//   combine   y[t, :] = sum_k weight[t, k] * down[t, k, :] + sigmoid(gate[t]) * shared[t, :], in the order k
//   = 0, 1, ...
//
// All in f32. For one token they touch tens of kilobytes, in cache: microseconds beside the weights.
#pragma once

namespace hm {
namespace {

void moe_route(const RouteTask& task, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const float* logit = task.logits + t * task.experts;
    int32_t* expert = task.expert + t * task.top_k;
    float* weight = task.weight + t * task.top_k;
    // Sorted by insertion: few pass the last one kept. Equal logits keep the lower expert in front.
    int64_t kept = 0;
    for (int64_t e = 0; e < task.experts; ++e) {
      if (kept == task.top_k && !(logit[e] > logit[expert[kept - 1]])) continue;
      int64_t i = kept < task.top_k ? kept++ : kept - 1;
      for (; i > 0 && logit[e] > logit[expert[i - 1]]; --i) expert[i] = expert[i - 1];
      expert[i] = int32_t(e);
    }
    Vec total = zero(), top = splat(logit[expert[0]]);
    int64_t e = 0;
    for (; e + kLanes <= task.experts; e += kLanes) total = add(total, exp_(sub(load(logit + e), top)));
    float rest = 0;
    for (; e < task.experts; ++e) rest += sum(exp_(sub(splat(logit[e]), top))) * (1.0f / kLanes);
    const float all = sum(total) + rest;
    float kept_sum = 0;
    for (int64_t i = 0; i < task.top_k; ++i) {
      float p[kLanes];
      store(p, exp_(sub(splat(logit[expert[i]]), top)));
      weight[i] = p[0] / all;
      kept_sum += weight[i];
    }
    if (task.normalize)
      for (int64_t i = 0; i < task.top_k; ++i) weight[i] /= kept_sum;
  }
}

void moe_swiglu(const SwigluTask& task, int64_t begin, int64_t end) {
  const int64_t n = task.width;
  for (int64_t r = begin; r < end; ++r) {
    const float *gate = task.gate_up + r * 2 * n, *up = gate + n;
    float* out = task.out + r * n;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, mul(silu(load(gate + i)), load(up + i)));
    const int left = int(n - i);
    if (left) store_n(out + i, mul(silu(load_n(gate + i, left)), load_n(up + i, left)), left);
  }
}

void moe_combine(const CombineTask& task, int64_t begin, int64_t end) {
  constexpr int64_t kSpan = 256;  // columns at once, so that the sums stay in L1
  const int64_t n = task.columns, item = task.out_type == hm_f32 ? 4 : 2;
  for (int64_t t = begin; t < end; ++t) {
    const Vec gate = sigmoid(splat(task.shared_gate[t]));
    for (int64_t k = 0; k < n; k += kSpan) {
      const int64_t span = n - k < kSpan ? n - k : kSpan;
      float y[kSpan];
      for (int64_t j = 0; j < span; j += kLanes) {
        const int live = int(span - j < kLanes ? span - j : kLanes);
        auto at = [&](const float* p) { return live == kLanes ? load(p + k + j) : load_n(p + k + j, live); };
        Vec v = zero();
        for (int64_t i = 0; i < task.top_k; ++i)
          v = fma(at(task.down + (t * task.top_k + i) * n), splat(task.weight[t * task.top_k + i]), v);
        v = fma(at(task.shared + t * n), gate, v);
        if (task.residual) v = add(at(task.residual + t * n), v);
        store_n(y + j, v, live);
      }
      narrow(y, task.y + (t * n + k) * item, span, Dtype(task.out_type));
    }
  }
}

}  // namespace
}  // namespace hm
