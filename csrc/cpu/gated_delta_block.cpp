// gated_delta_block: in x[b,t,x] f32, mask? bool|u8[b,t], norm f32[x], hidden_pre?, hidden_post?, inner_pre?,
// inner_post? f32, conv_weight f32[c,n], a_log f32[h], dt_bias f32[h], gated_norm f32[v], parts i64[1,p,12] of qkv, z,
// b, a, out, buffers u8...; out y f32[b,t,x], conv_state f32[b,c,n] and state f32[b,h,k,v], both read and
// replaced; ints hk, hv, dk, dv, hidden_block, inner_block (-1: no rotation), rotated (bit i: role i reads
// rotated input); floats eps. Letters as in gated_delta.
//
//   y = x + out(gated_delta(qkv, z, b, a of rmsnorm(x)))      y may be x
//
// A masked token's rmsnorm(x) is 0; those behind a sequence's last unmasked one leave its states as they are.
#include <algorithm>

#include "fused.h"
#include "gated_delta_plan.h"
#include "ops.h"

namespace hm {
namespace {

enum Input { kX, kMask, kNorm, kSigns, kVectors = kSigns + 4, kTables = kVectors + 4 };
enum Role { kQkv, kZ, kB, kA, kOut, kRoles };
constexpr const char* kRoleNames[kRoles] = {"qkv", "z", "b", "a", "out"};
constexpr RotationNames kHiddenNames{"norm", "hidden_block", "hidden_pre", "hidden_post", "pq"};
constexpr RotationNames kInnerNames{"out", "inner_block", "inner_pre", "inner_post", "rs"};
constexpr int64_t kBatch = 512;  // tokens at once: their projections take 25 MB

// Where the last unmasked token of each sequence ends.
std::vector<int64_t> unmasked(const uint8_t* mask, int64_t batch, int64_t tokens) {
  std::vector<int64_t> counts;
  for (int64_t b = 0; b < batch; ++b) {
    int64_t count = tokens;
    while (count > 0 && !mask[b * tokens + count - 1]) --count;
    counts.push_back(count);
  }
  return counts;
}

class GatedDeltaBlock {
 public:
  GatedDeltaBlock(const hm_args& a, bool keep) {
    c_.arity(a, kTables + kRoles, true, 3, 7, 1);
    c_.shape("norm", a.in[kNorm], "x").dtype("norm", a.in[kNorm], "f32");
    const int64_t k = c_['x'], rotated = a.ints[6];
    c_.require(k > 0, "norm", "has x=0, needs at least 1");
    check_gated_delta_sizes(c_, a.ints, a.floats[0], task_);
    check_gated_delta_vectors(c_, a.in + kVectors, task_);
    norm_ = {reinterpret_cast<const float*>(data(a.in[kNorm])), task_.eps};
    check_rotated(c_, rotated, kRoles, a.ints[4], ~(1 << kOut), a.ints[5], 1 << kOut);
    buffers_.emplace(c_, a, kTables + kRoles);
    hidden_.emplace(c_, kHiddenNames, k, a.ints[4], a.in[kSigns], a.in[kSigns + 1]);
    inner_.emplace(c_, kInnerNames, c_['m'], a.ints[5], a.in[kSigns + 2], a.in[kSigns + 3]);
    const int64_t rows[] = {c_['c'], c_['m'], c_['h'], c_['h'], k};
    for (int role = 0; role < kRoles; ++role) {
      const bool turned = rotated >> role & 1;
      const int64_t columns = (role == kOut ? *inner_ : *hidden_).columns(turned);
      roles_.emplace_back(c_, kRoleNames[role], turned, a.in[kTables + role], columns, *buffers_, keep);
      roles_.back().needs(c_, rows[role], 1);
    }
  }

  void call(const hm_args& a) const {
    Contract c = c_;
    GatedDeltaTask task = task_;
    c.shape("x", a.in[kX], "btx").dtype("x", a.in[kX], "f32");
    if (present(a.in[kMask])) c.shape("mask", a.in[kMask], "bt").dtype("mask", a.in[kMask], "bool u8");
    c.shape("y", a.out[0], "btx").dtype("y", a.out[0], "f32");
    check_gated_delta_states(c, a.out + 1, task);
    task.batch = c['b'];
    if (a.check || !task.batch) return;
    const int64_t tokens = c['t'], chunk = std::max<int64_t>(1, kBatch / task.batch);
    std::vector<int64_t> counts;
    if (present(a.in[kMask])) counts = unmasked(reinterpret_cast<const uint8_t*>(data(a.in[kMask])), task.batch, tokens);
    for (int64_t first = 0; first < tokens; first += chunk) {
      task.counts = counts.empty() ? nullptr : counts.data();
      step(a, task, {task.batch, tokens, hidden_->k(), first, std::min(chunk, tokens - first)});
      for (int64_t& count : counts) count -= chunk;  // the next chunk's tokens begin at 0
    }
  }

 private:
  void step(const hm_args& a, GatedDeltaTask task, const BlockRows& rows) const {
    Scratch scratch;
    const int64_t n = rows.all();
    const float* x = rows.gather(reinterpret_cast<const float*>(data(a.in[kX])), scratch);
    const uint8_t* mask = nullptr;
    if (present(a.in[kMask])) mask = rows.gather_mask(reinterpret_cast<const uint8_t*>(data(a.in[kMask])), scratch);
    float *proj = scratch.floats(n * task.proj_width), *core = scratch.floats(n * inner_->k());

    BlockTokens tokens(*hidden_), inner_tokens(*inner_);
    for (int role = 0; role < kOut; ++role) tokens.add_reader(c_, roles_[size_t(role)]);
    tokens.prepare(x, hm_f32, n, norm_, mask);
    Products up(hm_f32);
    int64_t at = 0;
    for (int role = 0; role < kOut; ++role) {
      tokens.add_products(up, roles_[size_t(role)], *buffers_, proj + at, task.proj_width, n);
      at += roles_[size_t(role)].parts.rows;
    }
    up.run();

    task.tokens = rows.count;
    task.proj = proj;
    task.y = core;
    task.proj_dtype = task.y_dtype = hm_f32;
    run_gated_delta(task);

    inner_tokens.add_reader(c_, roles_[kOut]);
    inner_tokens.prepare(core, hm_f32, n, {}, nullptr);
    float* out = scratch.floats(n * hidden_->k());
    Products down(hm_f32);
    inner_tokens.add_products(down, roles_[kOut], *buffers_, out, hidden_->k(), n);
    down.run();
    rows.add_to(x, out, reinterpret_cast<float*>(data(a.out[0])));
  }

  Contract c_{"gated_delta_block"};
  GatedDeltaTask task_{};
  BlockNorm norm_;
  std::optional<Buffers> buffers_;
  std::optional<BlockInput> hidden_, inner_;
  std::vector<RoleWeight> roles_;
};

}  // namespace

const hm_op gated_delta_block_op = bindable<GatedDeltaBlock>("gated_delta_block");

}  // namespace hm
