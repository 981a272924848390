// gated_delta: in proj[b,t,w] f32|bf16|f16 (qkv c | z hv*dv | b hv | a hv, c = 2*hk*dk + hv*dv),
// conv_weight f32[c,n], a_log f32[h], dt_bias f32[h], norm f32[v]; out y[b,t,m] f32 or proj's dtype,
// m = hv*dv, conv_state f32[b,c,n] and state f32[b,h,k,v], both read and replaced;
// ints hk, hv, dk, dv; floats eps. n taps, the newest input last. h = hv, k = dk, v = dv.
#include <algorithm>
#include <vector>

#include "../core/contract.h"
#include "../core/pool.h"
#include "kernels.h"
#include "ops.h"

namespace hm {
namespace {

GatedDeltaTask checked(const hm_args& args) {
  constexpr int64_t kMost = 1 << 20;  // of a head count or size: products stay far inside 64 bits
  Contract c("gated_delta");
  c.arity(args, 5, false, 3, 4, 1);
  const char* names[] = {"hk", "hv", "dk", "dv"};
  for (int i = 0; i < 4; ++i)
    c.require(args.ints[i] > 0 && args.ints[i] <= kMost, names[i],
              "is " + std::to_string(args.ints[i]) + ", needs 1.." + std::to_string(kMost));
  const int64_t hk = args.ints[0], hv = args.ints[1], dk = args.ints[2], dv = args.ints[3];
  c.require(hv % hk == 0, "hv", "is " + std::to_string(hv) + ", needs a multiple of hk=" + std::to_string(hk));
  const double eps = args.floats[0];
  c.require(eps >= 0 && eps < 1, "eps", "is " + std::to_string(eps) + ", needs 0 <= eps < 1");
  c.bind("hv", 'h', hv).bind("dk", 'k', dk).bind("dv", 'v', dv).bind("proj", 'c', 2 * hk * dk + hv * dv);
  c.bind("proj", 'm', hv * dv).bind("proj", 'w', c['c'] + c['m'] + 2 * hv);

  const DLTensor *in = args.in, *out = args.out;
  c.shape("proj", in[0], "btw").dtype("proj", in[0], "f32 bf16 f16");
  c.shape("conv_weight", in[1], "cn").dtype("conv_weight", in[1], "f32");
  c.require(c['n'] >= 1 && c['n'] <= kMostTaps, "conv_weight",
            "has n=" + std::to_string(c['n']) + ", needs 1.." + std::to_string(kMostTaps));
  c.shape("a_log", in[2], "h").dtype("a_log", in[2], "f32");
  c.shape("dt_bias", in[3], "h").dtype("dt_bias", in[3], "f32");
  c.shape("norm", in[4], "v").dtype("norm", in[4], "f32");
  const std::string narrow = dtype_name(in[0].dtype);
  c.shape("y", out[0], "btm").dtype("y", out[0], narrow == "f32" ? narrow : "f32 " + narrow);
  c.shape("conv_state", out[1], "bcn").dtype("conv_state", out[1], "f32");
  c.shape("state", out[2], "bhkv").dtype("state", out[2], "f32");

  auto numbers = [](const DLTensor& t) { return reinterpret_cast<float*>(data(t)); };
  GatedDeltaTask task{};
  task.proj = data(in[0]);
  task.proj_dtype = storage(in[0]);
  task.conv_weight = numbers(in[1]);
  task.a_log = numbers(in[2]);
  task.dt_bias = numbers(in[3]);
  task.norm = numbers(in[4]);
  task.y = data(out[0]);
  task.y_dtype = storage(out[0]);
  task.conv_state = numbers(out[1]);
  task.state = numbers(out[2]);
  task.batch = c['b'];
  task.tokens = c['t'];
  task.hk = hk;
  task.hv = hv;
  task.dk = dk;
  task.dv = dv;
  task.channels = c['c'];
  task.proj_width = c['w'];
  task.taps = int(c['n']);
  task.eps = float(eps);
  return task;
}

}  // namespace

const char* op_gated_delta(const hm_args* args) {
  return guarded([&] {
    GatedDeltaTask task = checked(*args);
    if (!task.batch || !task.tokens) return;
    // Convolved q, k, v of one chunk of tokens: 1 MB at the model's size, kept between calls.
    static thread_local std::vector<float> qkv;
    const int64_t chunk = std::min(task.tokens, std::max<int64_t>(1, kMostTokens / task.batch));
    constexpr uintptr_t kLine = 64;
    qkv.resize(std::max(qkv.size(), size_t(task.batch * chunk * task.channels) + kLine / sizeof(float)));
    task.qkv = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(qkv.data()) + kLine - 1) / kLine * kLine);
    const Kernels& kernel = kernels();
    for (task.first = 0; task.first < task.tokens; task.first += chunk) {
      task.count = std::min(chunk, task.tokens - task.first);
      parallel_range(task.batch * (2 * task.hk + task.hv), task.count == 1 ? 8 : 1,
                     [&](int64_t begin, int64_t end) { kernel.gated_delta_conv(task, begin, end); });
      parallel_range(task.batch * task.hv, 1,
                     [&](int64_t begin, int64_t end) { kernel.gated_delta_rule(task, begin, end); });
    }
  });
}

}  // namespace hm
