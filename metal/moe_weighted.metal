// What moe_down does, however inner states are read.
#include "moe_rows.metal"
#include "moe_choice.metal"

namespace hm {

// y[t, n] = residual[t, n] + sum_s weight_s down_s[n] . inner[t, s] + sigmoid(shared gate) shared[n] . inner[t, TOP_K],
// in this order; weight_s: the s-th share of moe_choice.metal.
//   logits, parts: as in moe_gate_up     IN, K: columns of an expert's rows as they are and rotated; SHARED_ of the shared
// A threadgroup has HEIGHT rows, its simdgroups the experts s, s + THREADS / 32, ...; groups: (blocks of rows, t)
template <int N, int IN, int K, int SHARED_IN, int SHARED_K, int EXPERTS, int TOP_K, int PARTS, int NORMALIZE,
          int HEIGHT, int OWN, int THREADS, int... KINDS, class Routed, class Shared, class Logits>
METAL_FUNC void weighted(Routed routed, Shared shared, Logits all_logits, const device uint* words,
                         const device uint* parts, const device float* residual, device float* y,
                         threadgroup float* terms, Place at) {
  constexpr uint width = ((IN > SHARED_IN ? IN : SHARED_IN) + 7) / 8 * 8, simds = THREADS / 32;
  const uint t = at.group.y, first = at.group.x * HEIGHT;
  const auto logits = all_logits + t * (EXPERTS + 1);
  const device float* x = routed.x + ulong(t) * (TOP_K + 1) * width;

  Choice<EXPERTS, TOP_K, NORMALIZE> choice;
  choice.open(logits, at.lane);
  for (uint s = at.simd; s < TOP_K; s += simds) {
    PartRows<IN, K, HEIGHT, Routed> product{
        words, routed.at(x + s * width), simd_shuffle(choice.share, ushort(s)), terms + s * HEIGHT, at.lane};
    const uint e = simd_shuffle(choice.expert, ushort(s));
    expert_rows<PARTS, HEIGHT, KINDS...>(parts + ulong(e) * (PARTS * 8), first, product);
  }
  for (uint i = at.simd * OWN; i < HEIGHT; i += simds * OWN) {  // OWN rows of the shared expert
    PartRows<SHARED_IN, SHARED_K, OWN, Shared> product{
        words, shared.at(x + TOP_K * width), sigmoid(logits[EXPERTS]), terms + TOP_K * HEIGHT + i, at.lane};
    expert_rows<PARTS, OWN, KINDS...>(parts + EXPERTS * PARTS * 8, first + i, product);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = at.index; i < HEIGHT && first + i < N; i += THREADS) {
    float sum = 0.0f;
    for (uint s = 0; s <= TOP_K; s++) sum += terms[s * HEIGHT + i];
    const ulong to = ulong(t) * N + first + i;
    y[to] = residual ? residual[to] + sum : sum;
  }
}

}  // namespace hm
