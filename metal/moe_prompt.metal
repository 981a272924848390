// What a prompt's mixture of experts needs around its products: SwiGLU and the weighted sum.
#include "moe_top.metal"

namespace hm {

// y[r, n] = silu(x[r, n]) * x[r, WIDTH + n]; groups: (pieces, rows)
template <int WIDTH, int THREADS>
METAL_FUNC void moe_swiglu(const device float* x, device float* y, Place at) {
  const uint i = at.group.x * THREADS + at.index;
  if (i >= WIDTH) return;
  const device float* gate = x + ulong(at.group.y) * 2 * WIDTH + i;
  y[ulong(at.group.y) * WIDTH + i] = gate[0] * sigmoid(gate[0]) * gate[WIDTH];
}

// y[t, n] = residual[t, n] + sum_s share[t, s] routed[t, s, n] + share[t, TOP_K] own[t, n]; groups: (pieces, t)
template <int WIDTH, int TOP_K, int THREADS>
METAL_FUNC void moe_join(const device float* routed, const device float* own, const device float* share,
                         const device float* residual, device float* y, Place at) {
  const uint i = at.group.x * THREADS + at.index;
  const ulong t = at.group.y;
  if (i >= WIDTH) return;
  share += t * (TOP_K + 1);
  float sum = 0.0f;
  for (uint s = 0; s < TOP_K; s++) sum += share[s] * routed[(t * TOP_K + s) * WIDTH + i];
  sum += share[TOP_K] * own[t * WIDTH + i];
  y[t * WIDTH + i] = residual ? residual[t * WIDTH + i] + sum : sum;
}

}  // namespace hm
