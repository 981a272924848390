// moe_decode: in x[t,k] f32|bf16|f16, hidden_pre?, hidden_post?, inter_pre?, inter_post? f32, parts
// i64[e,p,12] of router, gate_up, down, shared_gate_up, shared_down, shared_gate, buffers u8...; out y[t,k]
// f32|bf16|f16, or y, expert i32[t,a], weight f32[t,a]; ints top_k = a, normalize, hidden_block, inter_block
// (-1: no rotation), rotated (bit i: role i reads rotated input).
//
// moe_block, y = x + moe_decode(rmsnorm(x)): the same behind an input norm f32[k] and the float eps; x and y f32;
// y may be x.
//
// For one token five joins of the thread pool:
//   norm, rotate, prepare x | router, shared gate | route | gate_up of the chosen, shared gate_up
//   | swiglu, rotate, prepare, row by row | down, shared down | combine
#include "../core/pool.h"
#include "fused.h"
#include "ops.h"

namespace hm {
namespace {

enum Role { kRouter, kGateUp, kDown, kSharedGateUp, kSharedDown, kSharedGate, kRoles };
constexpr const char* kRoleNames[kRoles] = {"router",         "gate_up",     "down",
                                            "shared_gate_up", "shared_down", "shared_gate"};
constexpr RotationNames kHiddenNames{"x", "hidden_block", "hidden_pre", "hidden_post", "pq"};
constexpr RotationNames kInterNames{"x", "inter_block", "inter_pre", "inter_post", "uv"};
constexpr int64_t kInnerRoles = 1 << kDown | 1 << kSharedDown;
constexpr int64_t kBatch = 512;  // tokens at once: their inner states take 100 KB each

// What stays from call to call.
class Moe {
 public:
  Moe(const hm_args& a, bool keep, bool block) : c_(block ? "moe_block" : "moe_decode"), block_(block) {
    c_.arity(a, signs() + 4 + kRoles, true, a.n_out == 3 ? 3 : 1, 5, block);
    top_k = a.ints[0];
    normalize = a.ints[1] != 0;
    rotated_ = a.ints[4];
    if (present(a.in[0])) {
      check_call(c_, a);
    } else {
      c_.bind("top_k", 'a', top_k);
      bind_width(a);
    }
    const int64_t k = c_['k'];
    c_.require(k > 0, "x", "has k=0, needs at least 1");
    if (block) read_norm(a);
    c_.require(rotated_ >= 0 && rotated_ < 1 << kRoles, "rotated",
               "is " + std::to_string(rotated_) + ", needs 0..63");
    c_.require(a.ints[2] >= 0 || !(rotated_ & ~kInnerRoles), "rotated",
               "names readers of x, but hidden_block is -1");
    c_.require(a.ints[3] >= 0 || !(rotated_ & kInnerRoles), "rotated",
               "names down readers, but inter_block is -1");
    hidden.emplace(c_, kHiddenNames, k, a.ints[2], a.in[signs()], a.in[signs() + 1]);
    buffers.emplace(c_, a, signs() + 4 + kRoles);
    read_weights(a, keep);
  }

  // x, y, expert and weight.
  void check_call(Contract& c, const hm_args& a) const {
    const char* types = block_ ? "f32" : "f32 bf16 f16";
    c.shape("x", a.in[0], "tk").dtype("x", a.in[0], types);
    c.shape("y", a.out[0], "tk").dtype("y", a.out[0], types);
    c.bind("top_k", 'a', top_k);
    if (a.n_out < 3) return;
    c.shape("expert", a.out[1], "ta").dtype("expert", a.out[1], "i32");
    c.shape("weight", a.out[2], "ta").dtype("weight", a.out[2], "f32");
  }
  Contract contract() const { return c_; }
  bool block() const { return block_; }

  int64_t top_k = 0, inter = 0, shared_inter = 0;
  bool normalize = false;
  BlockNorm norm;
  std::optional<Buffers> buffers;
  std::optional<BlockInput> hidden, inner, shared_inner;
  std::vector<RoleWeight> weights;

 private:
  int signs() const { return block_ ? 2 : 1; }

  // A bound op meets its first x later: k is what the first expert's down writes.
  void bind_width(const hm_args& a) {
    const DLTensor& t = a.in[signs() + 4 + kDown];
    int64_t rows = 0;
    if (t.ndim == 3 && t.shape[2] == HM_PART_FIELDS && dtype_name(t.dtype) == "i64" && t.shape[0] > 0)
      for (int64_t i = 0; i < t.shape[1]; ++i) rows += reinterpret_cast<const hm_part*>(data(t))[i].rows;
    c_.bind("down", 'k', rows > 0 ? rows : 0);
  }
  void read_norm(const hm_args& a) {
    c_.shape("norm", a.in[1], "k").dtype("norm", a.in[1], "f32");
    const double eps = a.floats[0];
    c_.require(eps >= 0 && eps < 1, "eps", "is " + std::to_string(eps) + ", needs 0 <= eps < 1");
    norm = {reinterpret_cast<const float*>(data(a.in[1])), float(eps)};
  }
  const RoleWeight& read(const hm_args& a, bool keep, int role, const BlockInput& input) {
    const bool turned = rotated_ >> role & 1;
    weights.emplace_back(c_, kRoleNames[role], turned, a.in[signs() + 4 + role], input.columns(turned), *buffers, keep);
    return weights.back();
  }
  void read_inner(const hm_args& a, int role, int64_t width, std::optional<BlockInput>& input) {
    const bool turned = rotated_ >> role & 1;
    input.emplace(c_, kInterNames, width, turned ? a.ints[3] : -1, a.in[signs() + 2], a.in[signs() + 3]);
  }
  int64_t half(const RoleWeight& w) {
    const int64_t rows = w.parts.rows;
    c_.require(rows % 2 == 0, w.name, "has " + std::to_string(rows) + " rows, needs an even number");
    return rows / 2;
  }
  void read_weights(const hm_args& a, bool keep) {
    const int64_t k = c_['k'];
    weights.reserve(kRoles);
    read(a, keep, kRouter, *hidden);
    inter = half(read(a, keep, kGateUp, *hidden));
    read_inner(a, kDown, inter, inner);
    read(a, keep, kDown, *inner);
    shared_inter = half(read(a, keep, kSharedGateUp, *hidden));
    c_.require(!weights[kDown].rotated || !(rotated_ >> kSharedDown & 1) || inter == shared_inter, "shared_down",
               "reads " + std::to_string(shared_inter) + " columns, needs " + std::to_string(inter) +
                   " to share down's rotation");
    read_inner(a, kSharedDown, shared_inter, shared_inner);
    read(a, keep, kSharedDown, *shared_inner);
    read(a, keep, kSharedGate, *hidden);
    const int64_t experts = weights[kGateUp].parts.experts;
    weights[kRouter].needs(c_, experts, 1);
    weights[kDown].needs(c_, k, experts);
    weights[kSharedGateUp].needs(c_, 2 * shared_inter, 1);
    weights[kSharedDown].needs(c_, k, 1);
    weights[kSharedGate].needs(c_, 1, 1);
    c_.require(top_k > 0 && top_k <= experts, "top_k",
               "is " + std::to_string(top_k) + ", needs 1.." + std::to_string(experts));
  }

  Contract c_;
  bool block_;
  int64_t rotated_ = 0;
};

// One call. Its batches share what the readers asked of the tokens.
struct Run {
  const Moe& m;
  const hm_args& a;
  BlockTokens hidden, inner, shared_inner;

  Run(const Moe& moe, const hm_args& args)
      : m(moe), a(args), hidden(*m.hidden), inner(*m.inner), shared_inner(*m.shared_inner) {
    const Contract c = m.contract();
    for (int role = 0; role < kRoles; ++role) tokens(role).add_reader(c, m.weights[size_t(role)]);
  }

  BlockTokens& tokens(int role) { return role == kDown ? inner : role == kSharedDown ? shared_inner : hidden; }

  // out[i] = the role's rows times token i, for all tokens, under expert 0.
  void add_all(Products& products, int role, float* out, int64_t count) {
    const RoleWeight& weight = m.weights[size_t(role)];
    tokens(role).add_products(products, weight, *m.buffers, out, weight.parts.rows, count);
  }

  // out[s] = the rows of slot s's expert times its token (of x, or the slot's own inner state).
  void add_chosen(Products& products, int role, const ByExpert& by, float* out) {
    std::vector<const QmatmulInput*> token;
    std::vector<char*> to;
    const RoleWeight& weight = m.weights[size_t(role)];
    Tokens& from = tokens(role).of(weight);
    for (int64_t e = 0; e < weight.parts.experts; ++e) {
      token.clear();
      to.clear();
      for (int64_t i = by.first[size_t(e)]; i < by.first[size_t(e) + 1]; ++i) {
        const int64_t slot = by.order[size_t(i)];
        token.push_back(from[role == kDown ? slot : slot / m.top_k]);
        to.push_back(reinterpret_cast<char*>(out + slot * weight.parts.rows));
      }
      products.add(weight.parts, e, *m.buffers, from, token, to);
    }
  }

  // gate_up [count, 2 * width] to prepared inner states, row by row while each is in L1.
  void activate(const float* gate_up, int64_t width, BlockTokens& tokens, float* h, float* rotated, int64_t begin,
                int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      kernels().moe_swiglu({gate_up, h, width}, r, r + 1);
      tokens.prepare_rows(h, hm_f32, nullptr, rotated, {}, nullptr, r, r + 1);
    }
  }

  void activate_all(const float* gate_up, const float* shared_gate_up, int64_t slots, int64_t count, Scratch& scratch) {
    float *h = scratch.floats(slots * m.inter), *h2 = scratch.floats(slots * m.inner->columns(true));
    float *s = scratch.floats(count * m.shared_inter), *s2 = scratch.floats(count * m.shared_inner->columns(true));
    inner.allocate(slots);
    shared_inner.allocate(count);
    const int64_t grain = (8192 + m.inter - 1) / m.inter;
    parallel_range(slots + count, grain, [&](int64_t begin, int64_t end) {
      activate(gate_up, m.inter, inner, h, h2, begin, end < slots ? end : slots);
      activate(shared_gate_up, m.shared_inter, shared_inner, s, s2, begin > slots ? begin - slots : 0, end - slots);
    });
  }

  void batch(int64_t first, int64_t count, int32_t* expert, float* weight) {
    const int64_t k = m.hidden->k(), slots = count * m.top_k, experts = m.weights[kGateUp].parts.experts;
    const hm_scale x_type = storage(a.in[0]), y_type = storage(a.out[0]);
    const char* x = data(a.in[0]) + first * k * scale_bytes(x_type);
    Scratch scratch;
    hidden.prepare(x, x_type, count, m.norm, nullptr);

    float *logits = scratch.floats(count * experts), *shared_gate = scratch.floats(count);
    Products routing(hm_f32);
    add_all(routing, kRouter, logits, count);
    add_all(routing, kSharedGate, shared_gate, count);
    routing.run();
    const RouteTask route{logits, expert, weight, experts, m.top_k, m.normalize};
    parallel_range(count, 16, [&](int64_t begin, int64_t end) { kernels().moe_route(route, begin, end); });
    const std::vector<int64_t> chosen(expert, expert + slots);
    const ByExpert by(chosen.data(), slots, experts);

    float *gate_up = scratch.floats(slots * 2 * m.inter), *shared_gate_up = scratch.floats(count * 2 * m.shared_inter);
    Products up(hm_f32);
    add_chosen(up, kGateUp, by, gate_up);
    add_all(up, kSharedGateUp, shared_gate_up, count);
    up.run();
    activate_all(gate_up, shared_gate_up, slots, count, scratch);

    float *down = scratch.floats(slots * k), *shared = scratch.floats(count * k);
    Products products(hm_f32);
    add_chosen(products, kDown, by, down);
    add_all(products, kSharedDown, shared, count);
    products.run();
    const float* residual = m.block() ? reinterpret_cast<const float*>(x) : nullptr;
    char* y = data(a.out[0]) + first * k * scale_bytes(y_type);
    const CombineTask combine{down, weight, shared, shared_gate, residual, y, y_type, k, m.top_k};
    parallel_range(count, 4, [&](int64_t begin, int64_t end) { kernels().moe_combine(combine, begin, end); });
  }
};

template <bool kBlock>
class MoePlan {
 public:
  MoePlan(const hm_args& a, bool keep) : moe_(a, keep, kBlock) {}

  void call(const hm_args& a) const {
    Contract c = moe_.contract();
    moe_.check_call(c, a);
    if (a.check) return;
    Run run(moe_, a);
    const int64_t tokens = c['t'], most = tokens < kBatch ? tokens : kBatch;
    std::vector<int32_t> expert(size_t(most * moe_.top_k));
    std::vector<float> weight(size_t(most * moe_.top_k));
    const bool tell = a.n_out == 3;
    for (int64_t t = 0; t < tokens; t += most) {
      const int64_t count = tokens - t < most ? tokens - t : most, at = t * moe_.top_k;
      run.batch(t, count, tell ? reinterpret_cast<int32_t*>(data(a.out[1])) + at : expert.data(),
                tell ? reinterpret_cast<float*>(data(a.out[2])) + at : weight.data());
    }
  }

 private:
  Moe moe_;
};

}  // namespace

const hm_op moe_decode_op = bindable<MoePlan<false>>("moe_decode");
const hm_op moe_block_op = bindable<MoePlan<true>>("moe_block");

}  // namespace hm
