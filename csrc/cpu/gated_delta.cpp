// gated_delta: in proj[b,t,w] f32|bf16|f16 (qkv c | z hv*dv | b hv | a hv, c = 2*hk*dk + hv*dv),
// conv_weight f32[c,n], a_log f32[h], dt_bias f32[h], norm f32[v], counts? i64[b]; out y[b,t,m] f32 or
// proj's dtype, m = hv*dv, conv_state f32[b,c,n] and state f32[b,h,k,v], both read and replaced;
// ints hk, hv, dk, dv; floats eps. n taps, the newest input last. h = hv, k = dk, v = dv.
// Tokens of sequence b from counts[b] on are not there: their y is 0, the states do not see them.
#include "gated_delta_plan.h"

#include <algorithm>

#include "../core/pool.h"
#include "../core/scratch.h"
#include "ops.h"

namespace hm {
namespace {

float* numbers(const DLTensor& t) { return reinterpret_cast<float*>(data(t)); }

}  // namespace

void check_gated_delta_sizes(Contract& c, const int64_t* heads, double eps, GatedDeltaTask& task) {
  constexpr int64_t kMost = 1 << 20;  // of a head count or size: products stay far inside 64 bits
  const char* names[] = {"hk", "hv", "dk", "dv"};
  for (int i = 0; i < 4; ++i)
    c.require(heads[i] > 0 && heads[i] <= kMost, names[i],
              "is " + std::to_string(heads[i]) + ", needs 1.." + std::to_string(kMost));
  const int64_t hk = heads[0], hv = heads[1], dk = heads[2], dv = heads[3];
  c.require(hv % hk == 0, "hv", "is " + std::to_string(hv) + ", needs a multiple of hk=" + std::to_string(hk));
  c.require(eps >= 0 && eps < 1, "eps", "is " + std::to_string(eps) + ", needs 0 <= eps < 1");
  c.bind("hv", 'h', hv).bind("dk", 'k', dk).bind("dv", 'v', dv).bind("proj", 'c', 2 * hk * dk + hv * dv);
  c.bind("proj", 'm', hv * dv).bind("proj", 'w', c['c'] + c['m'] + 2 * hv);
  task.hk = hk;
  task.hv = hv;
  task.dk = dk;
  task.dv = dv;
  task.channels = c['c'];
  task.proj_width = c['w'];
  task.eps = float(eps);
}

void check_gated_delta_vectors(Contract& c, const DLTensor* vectors, GatedDeltaTask& task) {
  c.shape("conv_weight", vectors[0], "cn").dtype("conv_weight", vectors[0], "f32");
  c.require(c['n'] >= 1 && c['n'] <= kMostTaps, "conv_weight",
            "has n=" + std::to_string(c['n']) + ", needs 1.." + std::to_string(kMostTaps));
  c.shape("a_log", vectors[1], "h").dtype("a_log", vectors[1], "f32");
  c.shape("dt_bias", vectors[2], "h").dtype("dt_bias", vectors[2], "f32");
  c.shape("norm", vectors[3], "v").dtype("norm", vectors[3], "f32");
  task.conv_weight = numbers(vectors[0]);
  task.a_log = numbers(vectors[1]);
  task.dt_bias = numbers(vectors[2]);
  task.norm = numbers(vectors[3]);
  task.taps = int(c['n']);
}

void check_gated_delta_states(Contract& c, const DLTensor* states, GatedDeltaTask& task) {
  c.shape("conv_state", states[0], "bcn").dtype("conv_state", states[0], "f32");
  c.shape("state", states[1], "bhkv").dtype("state", states[1], "f32");
  task.conv_state = numbers(states[0]);
  task.state = numbers(states[1]);
}

void run_gated_delta(GatedDeltaTask task) {
  if (!task.batch || !task.tokens) return;
  // Convolved q, k, v of one chunk of tokens: 1 MB at the model's size.
  const int64_t chunk = std::min(task.tokens, std::max<int64_t>(1, kMostTokens / task.batch));
  Scratch scratch;
  task.qkv = scratch.floats(task.batch * chunk * task.channels);
  const Kernels& kernel = kernels();
  for (task.first = 0; task.first < task.tokens; task.first += chunk) {
    task.count = std::min(chunk, task.tokens - task.first);
    parallel_range(task.batch * (2 * task.hk + task.hv), task.count == 1 ? 8 : 1,
                   [&](int64_t begin, int64_t end) { kernel.gated_delta_conv(task, begin, end); });
    parallel_range(task.batch * task.hv, 1,
                   [&](int64_t begin, int64_t end) { kernel.gated_delta_rule(task, begin, end); });
  }
}

const char* op_gated_delta(const hm_args* args) {
  return guarded([&] {
    Contract c("gated_delta");
    c.arity(*args, 5, args->n_in == 6, 3, 4, 1);
    const DLTensor &proj = args->in[0], &y = args->out[0];
    GatedDeltaTask task{};
    check_gated_delta_sizes(c, args->ints, args->floats[0], task);
    c.shape("proj", proj, "btw").dtype("proj", proj, "f32 bf16 f16");
    check_gated_delta_vectors(c, args->in + 1, task);
    const std::string narrow = dtype_name(proj.dtype);
    c.shape("y", y, "btm").dtype("y", y, narrow == "f32" ? narrow : "f32 " + narrow);
    check_gated_delta_states(c, args->out + 1, task);
    if (args->n_in == 6 && present(args->in[5])) {
      c.shape("counts", args->in[5], "b").dtype("counts", args->in[5], "i64");
      task.counts = reinterpret_cast<const int64_t*>(data(args->in[5]));
    }
    task.batch = c['b'];
    task.tokens = c['t'];
    if (args->check) return;
    task.proj = data(proj);
    task.proj_dtype = storage(proj);
    task.y = data(y);
    task.y_dtype = storage(y);
    run_gated_delta(task);
  });
}

}  // namespace hm
