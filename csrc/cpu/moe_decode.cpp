// moe_decode: in x[t,k] f32|bf16|f16, hidden_pre?, hidden_post?, inter_pre?, inter_post? f32, parts
// i64[e,p,12] of router, gate_up, down, shared_gate_up, shared_down, shared_gate, buffers u8...; out y[t,k]
// f32|bf16|f16, or y, expert i32[t,a], weight f32[t,a]; ints top_k = a, normalize, hidden_block, inter_block
// (-1: no rotation), rotated (bit i: role i reads rotated input).
//
// For one token five joins of the thread pool:
//   rotate, prepare x | router, shared gate | route | gate_up of the chosen, shared gate_up
//   | swiglu, rotate, prepare, row by row | down, shared down | combine
#include "../core/contract.h"
#include "../core/pool.h"
#include "ops.h"
#include "qmatmul_plan.h"
#include "rotation.h"

namespace hm {
namespace {

enum Role { kRouter, kGateUp, kDown, kSharedGateUp, kSharedDown, kSharedGate, kRoles };
constexpr const char* kRoleNames[kRoles] = {"router",         "gate_up",     "down",
                                            "shared_gate_up", "shared_down", "shared_gate"};
constexpr RotationNames kHiddenNames{"x", "hidden_block", "hidden_pre", "hidden_post", "pq"};
constexpr RotationNames kInterNames{"x", "inter_block", "inter_pre", "inter_post", "uv"};
constexpr int64_t kBatch = 512;  // tokens at once: their inner states take 100 KB each

// f32 memory without the cost of clearing it.
struct Floats {
  std::unique_ptr<float[]> memory;
  explicit Floats(int64_t count) : memory(new float[size_t(count)]) {}
  float* operator+(int64_t i) const { return memory.get() + i; }
};

struct Moe {
  Contract c{"moe_decode"};
  const hm_args& args;
  const int64_t top_k, hidden_block, inter_block, rotated;
  const DLTensor &x, &y;
  int64_t k = 0, hidden_columns = 0, inter = 0, shared_inter = 0, columns[kRoles] = {};
  std::unique_ptr<Buffers> buffers;
  std::vector<Parts> parts;

  explicit Moe(const hm_args& a)
      : args(checked(a)),
        top_k(a.ints[0]),
        hidden_block(a.ints[2]),
        inter_block(a.ints[3]),
        rotated(a.ints[4]),
        x(a.in[0]),
        y(a.out[0]) {
    c.shape("x", x, "tk").dtype("x", x, "f32 bf16 f16");
    c.shape("y", y, "tk").dtype("y", y, "f32 bf16 f16");
    c.bind("top_k", 'a', top_k);
    if (args.n_out == 3) {
      c.shape("expert", args.out[1], "ta").dtype("expert", args.out[1], "i32");
      c.shape("weight", args.out[2], "ta").dtype("weight", args.out[2], "f32");
    }
    k = c['k'];
    c.require(k > 0, "x", "has k=0, needs at least 1");
    c.require(rotated >= 0 && rotated < 1 << kRoles, "rotated",
              "is " + std::to_string(rotated) + ", needs 0..63");
    c.require(hidden_block >= 0 || !(rotated & ~inner_roles()), "rotated",
              "names readers of x, but hidden_block is -1");
    c.require(inter_block >= 0 || !(rotated & inner_roles()), "rotated",
              "names down readers, but inter_block is -1");
    hidden_columns = hidden_block < 0 ? k : RowRotation::checked_columns(c, kHiddenNames, k, hidden_block);
    if (hidden_block >= 0) RowRotation::check_signs(c, kHiddenNames, hidden_columns, args.in[1], args.in[2]);
    buffers = std::make_unique<Buffers>(c, args, 5 + kRoles);
    read_weights();
  }

  bool is_rotated(int role) const { return rotated >> role & 1; }

 private:
  static constexpr int64_t inner_roles() { return 1 << kDown | 1 << kSharedDown; }
  const hm_args& checked(const hm_args& a) {
    c.arity(a, 5 + kRoles, true, a.n_out == 3 ? 3 : 1, 5, 0);
    return a;
  }
  void read(int role, int64_t width) {
    columns[role] = width;
    parts.emplace_back(c, kRoleNames[role], args.in[5 + role], width, *buffers);
  }
  int64_t inner_columns(int role, int64_t width) {
    if (!is_rotated(role)) return width;
    const int64_t n = RowRotation::checked_columns(c, kInterNames, width, inter_block);
    RowRotation::check_signs(c, kInterNames, n, args.in[3], args.in[4]);
    return n;
  }
  void needs_rows(int role, int64_t rows) {
    c.require(parts[size_t(role)].rows == rows, kRoleNames[role],
              "has " + std::to_string(parts[size_t(role)].rows) + " rows, needs " + std::to_string(rows));
  }
  void needs_experts(int role, int64_t experts) {
    c.require(
        parts[size_t(role)].experts == experts, kRoleNames[role],
        "has " + std::to_string(parts[size_t(role)].experts) + " experts, needs " + std::to_string(experts));
  }
  int64_t half(int role) {
    const int64_t rows = parts[size_t(role)].rows;
    c.require(rows % 2 == 0, kRoleNames[role], "has " + std::to_string(rows) + " rows, needs an even number");
    return rows / 2;
  }
  void read_weights() {
    auto hidden = [&](int role) { return is_rotated(role) ? hidden_columns : k; };
    read(kRouter, hidden(kRouter));
    read(kGateUp, hidden(kGateUp));
    inter = half(kGateUp);
    read(kDown, inner_columns(kDown, inter));
    read(kSharedGateUp, hidden(kSharedGateUp));
    shared_inter = half(kSharedGateUp);
    c.require(!is_rotated(kDown) || !is_rotated(kSharedDown) || inter == shared_inter, "shared_down",
              "reads " + std::to_string(shared_inter) + " columns, needs " + std::to_string(inter) +
                  " to share down's rotation");
    read(kSharedDown, inner_columns(kSharedDown, shared_inter));
    read(kSharedGate, hidden(kSharedGate));
    const int64_t experts = parts[kGateUp].experts;
    needs_experts(kRouter, 1);
    needs_rows(kRouter, experts);
    needs_experts(kDown, experts);
    needs_rows(kDown, k);
    for (int role : {kSharedGateUp, kSharedDown, kSharedGate}) needs_experts(role, 1);
    needs_rows(kSharedDown, k);
    needs_rows(kSharedGate, 1);
    c.require(top_k > 0 && top_k <= experts, "top_k",
              "is " + std::to_string(top_k) + ", needs 1.." + std::to_string(experts));
  }
};

// What one call keeps between its batches of tokens.
struct Run {
  const Moe& m;
  Tokens plain, turned, inner, shared_inner;  // x as it is and rotated; the two inner states
  std::unique_ptr<RowRotation> hidden, inter, shared_inter;

  explicit Run(const Moe& moe)
      : m(moe),
        plain(m.k),
        turned(m.hidden_columns),
        inner(m.columns[kDown]),
        shared_inner(m.columns[kSharedDown]) {
    for (int role = 0; role < kRoles; ++role)
      of(role).add_reader(m.c, kRoleNames[role], m.parts[size_t(role)]);
    const DLTensor* in = m.args.in;
    if (m.rotated & ~(1 << kDown | 1 << kSharedDown))
      hidden = std::make_unique<RowRotation>(m.k, m.hidden_columns, m.hidden_block, in[1], in[2]);
    if (m.is_rotated(kDown))
      inter = std::make_unique<RowRotation>(m.inter, m.columns[kDown], m.inter_block, in[3], in[4]);
    if (m.is_rotated(kSharedDown))
      shared_inter =
          std::make_unique<RowRotation>(m.shared_inter, m.columns[kSharedDown], m.inter_block, in[3], in[4]);
  }

  Tokens& of(int role) {
    if (role == kDown) return inner;
    if (role == kSharedDown) return shared_inner;
    return m.is_rotated(role) ? turned : plain;
  }

  // out[i] = the role's rows times token i, for all tokens, under expert 0.
  void add_all(Products& products, int role, float* out, int64_t count) {
    std::vector<const QmatmulInput*> token;
    std::vector<char*> to;
    for (int64_t i = 0; i < count; ++i) {
      token.push_back(of(role)[i]);
      to.push_back(reinterpret_cast<char*>(out + i * m.parts[size_t(role)].rows));
    }
    products.add(m.parts[size_t(role)], 0, *m.buffers, of(role), token, to);
  }

  // out[s] = the rows of slot s's expert times its token (of x, or the slot's own inner state).
  void add_chosen(Products& products, int role, const ByExpert& by, float* out) {
    std::vector<const QmatmulInput*> token;
    std::vector<char*> to;
    const Parts& weight = m.parts[size_t(role)];
    for (int64_t e = 0; e < weight.experts; ++e) {
      token.clear();
      to.clear();
      for (int64_t i = by.first[size_t(e)]; i < by.first[size_t(e) + 1]; ++i) {
        const int64_t slot = by.order[size_t(i)];
        token.push_back(of(role)[role == kDown ? slot : slot / m.top_k]);
        to.push_back(reinterpret_cast<char*>(out + slot * weight.rows));
      }
      products.add(weight, e, *m.buffers, of(role), token, to);
    }
  }

  void prepare_x(const char* x, int64_t count) {
    plain.prepare(x, storage(m.x), count);
    if (!hidden) return;
    const Floats y(count * m.hidden_columns);
    const HadamardTask task = hidden->task(x, storage(m.x), y + 0, hm_f32);
    parallel_range(count * hidden->units_per_row(), (32768 + hidden->unit() - 1) / hidden->unit(),
                   [&](int64_t begin, int64_t end) { kernels().hadamard(task, begin, end); });
    turned.prepare(y + 0, hm_f32, count);
  }

  // gate_up [count, 2 * width] to prepared inner states, row by row while each is in L1.
  void activate(const float* gate_up, int64_t width, const RowRotation* rotation, Tokens& tokens, float* h,
                float* rotated, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      kernels().moe_swiglu({gate_up, h, width}, r, r + 1);
      if (rotation)
        kernels().hadamard(rotation->task(h, hm_f32, rotated, hm_f32), r * rotation->units_per_row(),
                           (r + 1) * rotation->units_per_row());
      tokens.prepare(rotation ? rotated : h, hm_f32, r, r + 1);
    }
  }

  void batch(int64_t first, int64_t count, int32_t* expert, float* weight) {
    const int64_t slots = count * m.top_k, experts = m.parts[kGateUp].experts;
    prepare_x(data(m.x) + first * m.k * scale_bytes(storage(m.x)), count);

    const Floats logits(count * experts), shared_gate(count);
    Products routing(hm_f32);
    add_all(routing, kRouter, logits + 0, count);
    add_all(routing, kSharedGate, shared_gate + 0, count);
    routing.run();
    const RouteTask route{logits + 0, expert, weight, experts, m.top_k, m.args.ints[1] != 0};
    parallel_range(count, 16, [&](int64_t begin, int64_t end) { kernels().moe_route(route, begin, end); });
    const std::vector<int64_t> chosen(expert, expert + slots);
    const ByExpert by(chosen.data(), slots, experts);

    const Floats gate_up(slots * 2 * m.inter), shared_gate_up(count * 2 * m.shared_inter);
    Products up(hm_f32);
    add_chosen(up, kGateUp, by, gate_up + 0);
    add_all(up, kSharedGateUp, shared_gate_up + 0, count);
    up.run();

    const Floats h(slots * m.inter), h2(slots * m.columns[kDown]);
    const Floats s(count * m.shared_inter), s2(count * m.columns[kSharedDown]);
    inner.allocate(slots);
    shared_inner.allocate(count);
    const int64_t grain = (8192 + m.inter - 1) / m.inter;
    parallel_range(slots + count, grain, [&](int64_t begin, int64_t end) {
      const int64_t mine = end < slots ? end : slots;
      activate(gate_up + 0, m.inter, inter.get(), inner, h + 0, h2 + 0, begin, mine);
      activate(shared_gate_up + 0, m.shared_inter, shared_inter.get(), shared_inner, s + 0, s2 + 0,
               begin > slots ? begin - slots : 0, end - slots);
    });

    const Floats down(slots * m.k), shared(count * m.k);
    Products products(hm_f32);
    add_chosen(products, kDown, by, down + 0);
    add_all(products, kSharedDown, shared + 0, count);
    products.run();
    const CombineTask combine{down + 0,
                              weight,
                              shared + 0,
                              shared_gate + 0,
                              data(m.y) + first * m.k * scale_bytes(storage(m.y)),
                              storage(m.y),
                              m.k,
                              m.top_k};
    parallel_range(count, 4, [&](int64_t begin, int64_t end) { kernels().moe_combine(combine, begin, end); });
  }
};

}  // namespace

const char* op_moe_decode(const hm_args* args) {
  return guarded([&] {
    const Moe m(*args);
    Run run(m);
    const int64_t tokens = m.c['t'], most = tokens < kBatch ? tokens : kBatch;
    std::vector<int32_t> expert(size_t(most * m.top_k));
    std::vector<float> weight(size_t(most * m.top_k));
    const bool tell = args->n_out == 3;
    for (int64_t t = 0; t < tokens; t += most) {
      const int64_t count = tokens - t < most ? tokens - t : most;
      run.batch(t, count, tell ? reinterpret_cast<int32_t*>(data(args->out[1])) + t * m.top_k : expert.data(),
                tell ? reinterpret_cast<float*>(data(args->out[2])) + t * m.top_k : weight.data());
    }
  });
}

}  // namespace hm
