"""mlx-lm on the same weights and tokens: its mixture of experts, its gated delta net."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from hadamoe import Instance, ops
from hadamoe.verify import cases, layers, rounding
from hadamoe.weight import Part, Weight

from .support import raw

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (pip install 'hadamoe[test]')")
nn = pytest.importorskip("mlx.nn")
from mlx_lm.models import gated_delta, qwen3_next  # noqa: E402


def array(a) -> np.ndarray:
    return np.array(a.astype(mx.float32))


def weight_of(*layers) -> Weight:
    """Quantised layers of mlx-lm, stacked experts or one matrix; their rows side by side."""
    grid = []
    for layer in layers:
        codes, scales, biases = (np.array(layer[n]) for n in ("weight", "scales", "biases"))
        if codes.ndim == 2:
            codes, scales, biases = codes[None], scales[None], biases[None]
        columns = codes.shape[-1] * 32 // layer.bits
        inst = Instance("linear", layer.bits, "f32")
        grid.append([
            Part(inst, len(c), layer.group_size, raw(c), s.copy(), b.copy())
            for c, s, b in zip(codes, scales, biases, strict=True)
        ])  # fmt: skip
    return Weight(columns, tuple(zip(*grid, strict=True)))


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_mixture_of_experts(bits):
    mx.random.seed(bits)
    block = qwen3_next.Qwen3NextSparseMoeBlock(
        SimpleNamespace(
            hidden_size=128, moe_intermediate_size=64, shared_expert_intermediate_size=96,
            norm_topk_prob=True, num_experts=8, num_experts_per_tok=3,
        )
    )  # fmt: skip
    nn.quantize(block, group_size=32, bits=bits)
    experts, shared = block.switch_mlp, block.shared_expert
    moe = {
        "router": weight_of(block.gate),
        "gate_up": weight_of(experts.gate_proj, experts.up_proj),
        "down": weight_of(experts.down_proj),
        "shared_gate_up": weight_of(shared.gate_proj, shared.up_proj),
        "shared_down": weight_of(shared.down_proj),
        "shared_gate": weight_of(block.shared_expert_gate),
    }
    x = np.random.default_rng(bits).standard_normal((5, 128)).astype("f4")
    theirs = array(block(mx.array(x)))
    ours = ops.moe_decode(x, ops.MoeWeights.of(**moe), top_k=3)
    bound = cases.moe_decode_bound(x, moe, top_k=3).error
    assert (np.abs(ours - theirs) <= 2 * bound).all()
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


def test_gated_delta_net():
    b, t, hk, hv, dk, dv, taps = shape = (2, 5, 2, 4, 32, 16, 4)
    arrays = layers.gated_delta_arrays(np.random.default_rng(1), *shape)
    keys, c = hk * dk, 2 * hk * dk + hv * dv
    inputs = {name: mx.array(a) for name, a in arrays.items()}

    qkv, z, beta, a = mx.split(inputs["proj"], np.cumsum([c, hv * dv, hv]).tolist(), -1)
    before = inputs["conv_state"].transpose(0, 2, 1)[:, 1:]
    conv = nn.Conv1d(c, c, taps, groups=c, bias=False)
    conv.weight = inputs["conv_weight"][..., None]
    mixed = nn.silu(conv(mx.concatenate([before, qkv], 1)))
    q, k, v = mx.split(mixed, [keys, 2 * keys], -1)
    q, k = (u.reshape(b, t, hk, dk) for u in (q, k))
    q, k = gated_delta.normalize_qk(q, k, inv_scale=dk**-0.5, eps=1e-6)
    out, state = gated_delta.gated_delta_update(
        q, k, v.reshape(b, t, hv, dv), a, beta, inputs["a_log"], inputs["dt_bias"],
        inputs["state"].transpose(0, 1, 3, 2), use_kernel=False,
    )  # fmt: skip
    norm = qwen3_next.Qwen3NextRMSNormGated(dv, eps=1e-6)
    norm.weight = inputs["norm"]
    theirs = array(norm(out, z.reshape(b, t, hv, dv)).reshape(b, t, -1))

    want, want_state = rounding.gated_delta(**arrays, hk=hk, eps=1e-6)
    ours = ops.gated_delta(*arrays.values(), heads=(hk, hv), head_dims=(dk, dv))
    assert (np.abs(ours - theirs) <= 2 * want.error).all()
    theirs_state = array(state).transpose(0, 1, 3, 2)
    assert (np.abs(arrays["state"] - theirs_state) <= 2 * want_state.error).all()
