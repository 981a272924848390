// First half of a mixture of experts: inner = silu(gate) * up of a token's experts and of the shared one.
#include "moe_rows.metal"
#include "moe_top.metal"
#include "rotate.metal"

namespace hm {

// x in threadgroup memory, `slot` by slot.
template <int IN, int K>
struct Staged {
  const threadgroup float* x;

  template <int KIND>
  METAL_FUNC Staged read(uint) const { return *this; }
  template <bool ROTATED, bool WHOLE>
  METAL_FUNC void eight(int, uint i, thread float* v) const {
    EACH(j, 8) v[j] = 0.0f;
    if (WHOLE || i < uint(ROTATED ? K : IN)) turned_eight(x, i, v);
  }
};

// inner[t, s, i] = silu(x[t] . gate[i]) * (x[t] . up[i]) of the s-th expert of token t; s = TOP_K: the shared one.
//   logits [t, EXPERTS + 1]: the router's, then the shared gate's    parts: of EXPERTS + 1 experts, the shared one last
//   IN: columns of x      K: of a rotated row     INNER, SHARED: rows of gate and of up of an expert, of the shared one
//   TURNED, SHARED_TURNED: they read x rotated    BLOCK: of the rotation, -1 none   EPS: bits of the norm's
//   HEIGHT: rows of a simdgroup                   KINDS: of the parts
// groups: (blocks of rows, s, t)
template <int IN, int K, int INNER, int SHARED, int TURNED, int SHARED_TURNED, int EXPERTS, int TOP_K, int PARTS,
          int HEIGHT, int THREADS, int BLOCK, int PRES, int POSTS, int EPS, int... KINDS, class Logits>
METAL_FUNC void moe_gate_up(const device float* all_x, const device float* gamma, const device float* pre,
                            const device float* post, Logits logits, const device uint* words,
                            const device uint* parts, device float* inner, threadgroup float* staged,
                            threadgroup float* partial, threadgroup float* terms, Place at) {
  constexpr uint width = ((INNER > SHARED ? INNER : SHARED) + 7) / 8 * 8, simds = THREADS / 32;
  const uint s = at.group.y, t = at.group.z, rows = s < TOP_K ? INNER : SHARED;
  uint expert = EXPERTS;
  if (s < TOP_K) {
    Ranking<EXPERTS> ranking;
    ranking.open(logits + t * (EXPERTS + 1), at.lane);
    for (uint i = 0; i <= s; i++) expert = ranking.next(at.lane);
  }
  const device float* x = all_x + ulong(t) * IN;
  if (s < TOP_K ? TURNED : SHARED_TURNED) {
    if constexpr (BLOCK >= 0) rotate<IN, K, BLOCK, PRES, POSTS, K, THREADS>(x, gamma, pre, post, staged, partial, 0, at);
  } else {
    float square = 0.0f, v[8], g[8];
    for (uint i = 8 * at.index; i < IN; i += 8 * THREADS) {
      load_eight<IN>(x, i, v);
      EACH(j, 8) square = fma(v[j], v[j], square);
      if (gamma) load_eight<IN>(gamma, i, g);
      EACH(j, 8) staged[slot(i + j)] = gamma ? v[j] * g[j] : v[j];
    }
    square = simd_sum(square);
    if (at.lane == 0) partial[at.simd] = square;
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  float inverse = 1.0f;
  if (gamma) {
    float square = 0.0f;
    for (uint i = 0; i < simds; i++) square += partial[i];
    inverse = 1.0f / precise::sqrt(square / float(IN) + as_type<float>(EPS));
  }

  const uint first = (at.group.x * simds + at.simd) * HEIGHT;
  if (first >= rows) return;
  threadgroup float* gate = terms + at.simd * 2 * HEIGHT;
  PartRows<IN, K, HEIGHT, Staged<IN, K>> product{words, {staged}, inverse, gate, at.lane};
  for (uint side = 0; side < 2; side++, product.to += HEIGHT)
    expert_rows<PARTS, HEIGHT, KINDS...>(parts + ulong(expert) * (PARTS * 8), first + side * rows, product);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = at.lane; i < HEIGHT && first + i < rows; i += 32)
    inner[(ulong(t) * (TOP_K + 1) + s) * width + first + i] = gate[i] * sigmoid(gate[i]) * gate[HEIGHT + i];
}

}  // namespace hm
