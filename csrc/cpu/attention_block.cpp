// attention_block: in x[b,t,k] f32, cos f32[b,t,r], sin f32[b,t,r], mask? bool|u8[b,t,n], norm f32[k],
// hidden_pre?, hidden_post?, inner_pre?, inner_post? f32, q_norm f32[d], k_norm f32[d], parts i64[1,p,12] of q, k,
// v, o, buffers u8...; out y f32[b,t,k], keys and values f32|bf16|f16[b,g,c,d], both read and written;
// ints past, hidden_block, inner_block (-1: no rotation), rotated (bit i: role i reads rotated input); floats eps.
//
// kv_attention_block: the same over pages: in x, cos, sin, a cache's inputs (kv_plan.h), norm and what follows it; out y,
// a cache's outputs; ints a cache's, hidden_block, inner_block, rotated.
//
//   y = x + o(attention(q, k, v of rmsnorm(x)))       y may be x
#include <algorithm>

#include "attention_plan.h"
#include "fused.h"
#include "kv_plan.h"
#include "ops.h"

namespace hm {
namespace {

enum Input { kX, kCos, kSin, kCache };  // then the cache's, then these:
enum Fixed { kNorm, kSigns, kHeadNorms = kSigns + 4, kTables = kHeadNorms + 2 };
enum Role { kQ, kK, kV, kO, kRoles };
constexpr const char* kRoleNames[kRoles] = {"q", "k", "v", "o"};
constexpr RotationNames kHiddenNames{"norm", "hidden_block", "hidden_pre", "hidden_post", "ij"};
constexpr RotationNames kInnerNames{"o", "inner_block", "inner_pre", "inner_post", "xy"};

// Keys and values side by side, behind a mask.
struct Contiguous {
  static constexpr const char* kName = "attention_block";
  static constexpr int kInputs = 1, kOutputs = 2, kInts = 1;

  Contiguous(Contract& c, const hm_args& a, const DLTensor* norms, int64_t heads) {
    check_attention(c, norms, a.in + kCos, a.in[kCache], a.out + 1, heads, a.ints[0], a.floats[0], task);
  }
  void run(const Contract&, const AttentionTask& t, int64_t first, int64_t count) const {
    run_attention(t, first, count, true);
  }
  AttentionTask task{};
};

// Pages of a quantized cache.
struct Paged {
  static constexpr const char* kName = "kv_attention_block";
  static constexpr int kInputs = KvArguments::kInputs, kOutputs = KvArguments::kOutputs, kInts = KvArguments::kInts;

  Paged(Contract& c, const hm_args& a, const DLTensor* norms, int64_t heads) : cache(c, a.in + kCache, a.out + 1, a.ints) {
    task = cache.task.raw;
    check_projected(c, norms, a.in + kCos, task);
    check_heads(c, heads, a.floats[0], task);
    task.scale = 1;
    if (!a.check) cache.check_tables(c, task.tokens, true);
  }
  void run(const Contract& c, const AttentionTask& t, int64_t first, int64_t count) const {
    KvTask all = cache.task;
    all.raw = t;
    run_kv_attention(c, cache, all, KvSource::kProjected, t.tokens, first, count, true);
  }
  KvArguments cache;
  AttentionTask task{};
};

template <class Cache>
class AttentionBlock {
 public:
  AttentionBlock(const hm_args& a, bool keep) {
    c_.arity(a, kBegin + kTables + kRoles, true, 1 + Cache::kOutputs, Cache::kInts + 3, 1);
    const DLTensor* in = a.in + kBegin;
    const int64_t* ints = a.ints + Cache::kInts;
    c_.shape("norm", in[kNorm], "k").dtype("norm", in[kNorm], "f32");
    c_.shape("q_norm", in[kHeadNorms], "d");
    const int64_t k = c_['k'], d = c_['d'], rotated = ints[2];
    c_.require(k > 0, "norm", "has k=0, needs at least 1");
    c_.require(d > 0, "q_norm", "has d=0, needs at least 1");
    check_rotated(c_, rotated, kRoles, ints[0], ~(1 << kO), ints[1], 1 << kO);
    buffers_.emplace(c_, a, kBegin + kTables + kRoles);
    hidden_.emplace(c_, kHiddenNames, k, ints[0], in[kSigns], in[kSigns + 1]);
    auto read = [&](int role, const BlockInput& input) {
      const bool turned = rotated >> role & 1;
      roles_.emplace_back(c_, kRoleNames[role], turned, in[kTables + role], input.columns(turned), *buffers_, keep);
      return roles_.back().parts.rows;
    };
    const int64_t q_rows = read(kQ, *hidden_), k_rows = read(kK, *hidden_);
    multiple("q", q_rows, 2 * d);
    multiple("k", k_rows, d);
    heads_ = q_rows / (2 * d);
    c_.bind("k", 'g', k_rows / d);
    read(kV, *hidden_);
    inner_.emplace(c_, kInnerNames, heads_ * d, ints[1], in[kSigns + 2], in[kSigns + 3]);
    read(kO, *inner_);
    roles_[kQ].needs(c_, q_rows, 1);
    roles_[kK].needs(c_, k_rows, 1);
    roles_[kV].needs(c_, k_rows, 1);
    roles_[kO].needs(c_, k, 1);
  }

  void call(const hm_args& a) const {
    Contract c = c_;
    c.shape("x", a.in[kX], "btk").dtype("x", a.in[kX], "f32");
    const Cache cache(c, a, a.in + kBegin + kHeadNorms, heads_);
    const AttentionTask& task = cache.task;
    c.shape("y", a.out[0], "btk").dtype("y", a.out[0], "f32");
    if (a.check || !task.batch || !task.tokens) return;
    const int64_t chunk = attention_chunk(task.batch, task.tokens);
    for (int64_t first = 0; first < task.tokens; first += chunk)
      step(a, c, cache, first, std::min(chunk, task.tokens - first));
  }

 private:
  static constexpr int kBegin = kCache + Cache::kInputs;

  void multiple(const char* role, int64_t rows, int64_t of) {
    c_.require(rows % of == 0, role, "has " + std::to_string(rows) + " rows, needs a multiple of " + std::to_string(of));
  }

  // Tokens first.. of every sequence.
  void step(const hm_args& a, const Contract& c, const Cache& cache, int64_t first, int64_t count) const {
    Scratch scratch;
    AttentionTask task = cache.task;
    const BlockRows rows{task.batch, task.tokens, hidden_->k(), first, count};
    const int64_t n = rows.all(), inner = inner_->k();
    const float* x = rows.gather(reinterpret_cast<const float*>(data(a.in[kX])), scratch);
    float *proj = scratch.floats(n * task.proj_width), *core = scratch.floats(n * inner);

    BlockTokens tokens(*hidden_), inner_tokens(*inner_);
    for (int role : {kQ, kK, kV}) tokens.add_reader(c_, roles_[size_t(role)]);
    tokens.prepare(x, hm_f32, n, {reinterpret_cast<const float*>(data(a.in[kBegin + kNorm])), float(a.floats[0])}, nullptr);
    Products up(hm_f32);
    int64_t at = 0;
    for (int role : {kQ, kK, kV}) {
      tokens.add_products(up, roles_[size_t(role)], *buffers_, proj + at, task.proj_width, n);
      at += roles_[size_t(role)].parts.rows;
    }
    up.run();

    task.proj = proj;
    task.y = core;
    task.proj_dtype = task.y_dtype = hm_f32;
    cache.run(c, task, first, count);

    inner_tokens.add_reader(c_, roles_[kO]);
    inner_tokens.prepare(core, hm_f32, n, {}, nullptr);
    float* out = scratch.floats(n * hidden_->k());
    Products down(hm_f32);
    inner_tokens.add_products(down, roles_[kO], *buffers_, out, hidden_->k(), n);
    down.run();
    rows.add_to(x, out, reinterpret_cast<float*>(data(a.out[0])));
  }

  Contract c_{Cache::kName};
  std::optional<Buffers> buffers_;
  std::optional<BlockInput> hidden_, inner_;
  std::vector<RoleWeight> roles_;
  int64_t heads_ = 0;
};

}  // namespace

const hm_op attention_block_op = bindable<AttentionBlock<Contiguous>>(Contiguous::kName);
const hm_op kv_attention_block_op = bindable<AttentionBlock<Paged>>(Paged::kName);

}  // namespace hm
