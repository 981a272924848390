"""Kernels of mlx-lm and jang through the stand-in for `mx.fast.metal_kernel`, as they are called.

Nobody here wrote them: the simulator has to run what real packages write, and agrees with the CPU
paths those packages have themselves.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys

import numpy as np
import pytest

from simt import metal

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (pip install 'hadamoe[test]')")
with contextlib.redirect_stdout(io.StringIO()):  # greets on import
    pytest.importorskip("jang_tools", reason="jang is not installed (pip install 'hadamoe[test]')")
    from jang_tools.turboquant import codebook, linear, rotation

pytestmark = pytest.mark.skipif(bool(metal.missing()), reason=str(metal.missing()))


@contextlib.contextmanager
def imported(name: str, **options):
    """A module imported anew in the simulator, where it asks for its kernels, and the log."""
    before = importlib.import_module(name)  # what it imports must not know the simulator
    del sys.modules[name]
    parent, _, leaf = name.rpartition(".")
    try:
        with metal.installed(**options) as log:
            yield importlib.import_module(name), log
    finally:
        sys.modules[name] = before
        setattr(sys.modules[parent], leaf, before)


def random(*shape: int, scale: float = 1.0) -> mx.array:
    values = np.random.default_rng(sum(shape)).standard_normal(shape)
    return mx.array((scale * values).astype("f4"))


def difference(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max())


def delta_inputs(vector_gate: bool = False, dtype=mx.float32) -> list[mx.array]:
    tokens, heads, width = 5, 4, 128
    gates = (2, tokens, heads, width) if vector_gate else (2, tokens, heads)
    q, k = (random(2, tokens + i, 2, width, scale=0.09)[:, i:].astype(dtype) for i in range(2))
    beta = mx.sigmoid(random(2, tokens, heads)).astype(dtype)
    v = random(2, tokens, heads, width).astype(dtype)
    return [q, k, v, mx.sigmoid(random(*gates)), beta, random(2, heads, width, width)]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("name", ["unpacked", "packed", "xtree", "vector gate"])
def test_mlx_lm_gated_delta(name, dtype):
    inputs = delta_inputs(name == "vector gate", dtype)
    with imported("mlx_lm.models.gated_delta", check=True) as (module, log):
        if name == "xtree":
            got = module.gated_delta_kernel_xtree(*inputs)
        else:
            got = (module.gated_delta_kernel_unpacked, module.gated_delta_kernel)[name == "packed"](
                *inputs
            )
        want = module.gated_delta_ops(*inputs)
    assert len(log) == 1
    assert difference(got[0], want[0]) < (1e-5 if dtype == mx.float32 else 0.02)
    assert difference(got[1], want[1]) < (1e-5 if dtype == mx.float32 else 0.05)


def test_the_package_is_left_as_it_was():
    name = "mlx_lm.models.gated_delta"
    module = importlib.import_module(name)
    with imported(name) as (inside, _):
        assert inside is not module
    assert importlib.import_module(name) is module
    assert importlib.import_module("mlx_lm.models").gated_delta is module


def test_mlx_lm_gated_delta_packed_is_xtree_bit_for_bit():
    """mlx-lm's own claim about its two kernels holds here too."""
    inputs = delta_inputs()
    with imported("mlx_lm.models.gated_delta") as (module, _):
        packed, tree = module.gated_delta_kernel(*inputs), module.gated_delta_kernel_xtree(*inputs)
    assert all(mx.array_equal(a, b) for a, b in zip(packed, tree, strict=True))


def test_mlx_lm_gated_delta_with_a_mask():
    inputs, mask = delta_inputs(), mx.array([[True] * 5, [False] * 2 + [True] * 3])
    with imported("mlx_lm.models.gated_delta", check=True, findings="keep") as (module, log):
        got = module.gated_delta_kernel(*inputs, mask)
        want = module.gated_delta_ops(*inputs, mask=mask)
    assert difference(got[1], want[1]) < 1e-5
    # 32 lanes store the same zero where the mask is off: harmless, and by the rules a race.
    assert {f.kind for f in log[0].findings} == {"race-write-write"}


def test_mlx_lm_expert_routing():
    logits, bias = random(3, 64), random(64, scale=0.1)
    with imported("mlx_lm.kernels.expert_routing", check=True) as (module, _):
        chosen, weights = module.expert_routing(
            logits, bias, top_k=8, multiplier=1.0, score_eps=0.0, route_scale=2.0
        )
    assert chosen.shape == weights.shape == (3, 8)
    assert np.allclose(np.array(weights).sum(-1), 2.0, atol=1e-5)
    assert all(len(set(row)) == 8 for row in np.array(chosen).tolist())


def test_mlx_lm_norm_and_gate():
    x, gate = random(1, 4, 3, 96), random(1, 3, 4 * 96)
    with imported("mlx_lm.kernels.rms_norm_sigmoid_gate", check=True) as (module, _):
        got = module.rms_norm_sigmoid_gate(x, gate, eps=1e-6)
    normed = mx.fast.rms_norm(x, None, 1e-6).swapaxes(1, 2).reshape(gate.shape)
    assert difference(got, normed * mx.sigmoid(gate)) < 2e-6


@pytest.mark.parametrize("width", [128, 1536, 2048, 6144])
def test_jang_hadamard(width):
    """A power of two, two sums of powers of two, and more than one threadgroup array's worth."""
    x = random(2, width)
    signs = mx.array(np.array(rotation.generate_random_signs(width, seed=42)).astype("f4"))
    name = "jang_tools.turboquant.hadamard_kernel"
    with imported(name, check=True) as (module, log):
        got = module.hadamard_rotate_metal(x, signs)
    assert len(log) == 1
    assert difference(got, rotation.hadamard_rotate(x, signs)) < 5e-6


class JangWeight:
    """A random matrix as jang stores it, and its numbers: rows before the rotation is undone."""

    def __init__(self, rows: int, width: int, bits: int):
        made = linear.tq_quantize_weight(np.array(random(rows, width)), bits, seed=42)
        self.packed, self.norms = mx.array(made["packed"]), mx.array(made["norms"])
        self.book = mx.array(np.array(codebook.compute_codebook(width, bits), np.float32))
        self.signs = mx.array(np.array(rotation.generate_random_signs(width, 42)).astype("f4"))
        shifts = (mx.arange(32 // bits) * bits).astype(mx.uint32)
        codes = (self.packed[:, :, None] >> shifts) & (2**bits - 1)
        self.rows = self.book[codes.reshape(rows, width)]
        self.rows = self.rows * self.norms.astype(mx.float32)[:, None]

    def product(self, x: mx.array) -> mx.array:
        """x times the matrix."""
        return rotation.hadamard_rotate(x, self.signs) @ self.rows.T


@contextlib.contextmanager
def jang(name: str):
    """A module of jang in the simulator, over a rotation in the simulator."""
    rotating = imported("jang_tools.turboquant.hadamard_kernel", check=True)
    with rotating, imported(f"jang_tools.turboquant.{name}", check=True) as (module, log):
        yield module, log


@pytest.mark.parametrize("bits", [2, 4])
def test_jang_product(bits):
    w, x = JangWeight(16, 512, bits), random(2, 512)
    with jang("tq_kernel") as (module, log):
        got = module.tq_matmul(x, w.packed, w.norms, w.book, w.signs, 512, bits)
    assert difference(got, w.product(x)) < 1e-4
    # a word of codes is read once for each number in it, by each of two tokens
    assert log[-1].traffic["packed"] == (2 * 32 // bits * w.packed.nbytes, 0)


@pytest.mark.parametrize("name", ["gather_tq_kernel", "fused_gate_up_kernel"])
def test_jang_experts(name):
    """Chosen experts' rows for one token: a product, and gate, up and SwiGLU together."""
    rows, width, bits = 48, 512, 2
    gate, up = JangWeight(4 * rows, width, bits), JangWeight(4 * rows + 4, width, bits)
    x, chosen = random(1, width), mx.array([[2, 0]], dtype=mx.uint32)

    def stacked(w: JangWeight) -> list[mx.array]:
        return [w.packed[: 4 * rows].reshape(4, rows, -1), w.norms[: 4 * rows].reshape(4, rows)]

    def expert(w: JangWeight) -> mx.array:
        return w.product(x)[0, : 4 * rows].reshape(4, rows)[chosen[0]]

    with jang(name) as (module, log):
        shared = gate.book, gate.signs, chosen, bits
        if name == "gather_tq_kernel":
            got = module.gather_tq_matmul(x.reshape(1, 1, width), *stacked(gate), *shared)
            want = expert(gate)
        else:
            parts = [*stacked(gate), *stacked(up)]
            got = module.fused_gate_up_swiglu_matmul(x.reshape(1, 1, width), *parts, *shared)
            want = expert(gate) * mx.sigmoid(expert(gate)) * expert(up)
        read = sum(log[-1].traffic[n][0] for n in log[-1].traffic if n.startswith("packed"))
    scale = float(mx.abs(want).max())
    assert difference(got.reshape(2, rows), want) < 2e-6 * max(scale, 100)
    weights = 2 * rows * gate.packed.shape[1] * 4 * (1 if name == "gather_tq_kernel" else 2)
    assert read == weights  # each chosen expert's codes once
