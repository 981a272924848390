// What moe_gate_up does with an x in threadgroup memory, rotated or not.
#include "moe_rows.metal"
#include "moe_top.metal"

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

// The same for x as it is: times the norm's weights, its sum of squares in partial, simdgroup by simdgroup.
template <int IN, int THREADS>
METAL_FUNC void stage(const device float* x, const device float* gamma, threadgroup float* staged,
                      threadgroup float* partial, Place at) {
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

// What follows when x is staged.
template <int IN, int K, int INNER, int SHARED, int EXPERTS, int TOP_K, int PARTS, int HEIGHT, int THREADS, int EPS,
          int... KINDS, class Logits>
METAL_FUNC void staged_gate_up(bool norm, Logits logits, const device uint* words, const device uint* parts,
                               device float* inner, const threadgroup float* staged, const threadgroup float* partial,
                               threadgroup float* terms, Place at) {
  constexpr uint width = ((INNER > SHARED ? INNER : SHARED) + 7) / 8 * 8, simds = THREADS / 32;
  const uint s = at.group.y, t = at.group.z, rows = s < TOP_K ? INNER : SHARED;
  const uint first = (at.group.x * simds + at.simd) * HEIGHT;
  if (first >= rows) return;
  uint expert = EXPERTS;
  if (s < TOP_K) {
    Ranking<EXPERTS> ranking;
    ranking.open(logits + t * (EXPERTS + 1), at.lane);
    for (uint i = 0; i <= s; i++) expert = ranking.next(at.lane);
  }
  float inverse = 1.0f, square = 0.0f;
  if (norm) {
    for (uint i = 0; i < simds; i++) square += partial[i];
    inverse = 1.0f / precise::sqrt(square / float(IN) + as_type<float>(EPS));
  }
  threadgroup float* gate = terms + at.simd * 2 * HEIGHT;
  PartRows<IN, K, HEIGHT, Staged<IN, K>> product{words, {staged}, inverse, gate, at.lane};
  for (uint side = 0; side < 2; side++, product.to += HEIGHT)
    expert_rows<PARTS, HEIGHT, KINDS...>(parts + ulong(expert) * (PARTS * 8), first + side * rows, product);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = at.lane; i < HEIGHT && first + i < rows; i += 32)
    inner[(ulong(t) * (TOP_K + 1) + s) * width + first + i] = gate[i] * sigmoid(gate[i]) * gate[HEIGHT + i];
}

}  // namespace hm
