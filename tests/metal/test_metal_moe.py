"""The mixture of experts on Metal: exact where nothing rounds, right in every published format."""

from __future__ import annotations

import mlx.core as mx
import moe_weights
import numpy as np
import pytest
from moe_claims import (  # noqa: F401
    distance,
    test_a_shared_expert_of_another_width,
    test_a_token_depends_on_nothing_else,
    test_an_inner_state_that_is_padded,
    test_equal_logits_take_the_lower_expert,
    test_experts_of_many_kinds,
    test_logits_that_are_no_numbers,
    test_near_the_reference,
    tokens,
)
from simt import metal

from hadamoe import mlx_gpu_moe, ops, reference
from hadamoe.verify import cases, claims
from hadamoe.weight import Weight

pytestmark = pytest.mark.skipif(metal.missing() is not None, reason=str(metal.missing()))


def run(x: np.ndarray, moe: dict[str, Weight], top_k: int, *, normalize=True, **options):
    """`ops.moe_decode` of an MLX array on the simulated device; checked unless told otherwise."""
    weights = ops.MoeWeights.of(**moe)
    with metal.installed(**{"check": True} | options):
        return np.array(ops.moe_decode(mx.array(x), weights, top_k=top_k, normalize=normalize))


@pytest.fixture
def run_moe():
    return run


@pytest.fixture
def on_metal(monkeypatch):
    """Lets the cases of `hadamoe.verify` run on the simulated device."""
    real = ops.moe_decode

    def moe_decode(x, moe, **sizes):
        with metal.installed(check=True):
            return np.array(real(mx.array(x), moe, **sizes))

    monkeypatch.setattr(ops, "moe_decode", moe_decode)


@pytest.mark.parametrize("inst", ops.instances(), ids=str)
def test_exact(inst, on_metal):
    """Every instance in gate_up and in down, one token and several: no bit is wrong."""
    several, one, *_ = cases.moe_decode_cases(inst)
    for case in (several, one):
        claims.compare(case, case.run())


@pytest.mark.parametrize("name", ["config-i", "tq-apex2", "jangtq2"])
def test_block(name, rng):
    """The norm in front and the residual behind are inside; three launches."""
    moe = moe_weights.moe(rng, name)
    x, norm = tokens(rng, 3), rng.uniform(0.5, 1.5, 256).astype(np.float32)
    weights = ops.MoeWeights.of(**moe)
    with metal.installed(check=True) as log:
        y = np.array(mlx_gpu_moe.moe_block(mx.array(x), mx.array(norm), weights, top_k=3))
    want = reference.moe_block(x, norm, moe, top_k=3)
    assert distance(y, want) < 3e-6
    assert distance(y, want - x) > 1e-3
    assert len(log) == 3


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_halves(dtype, rng):
    moe = moe_weights.moe(rng, "config-i")
    x = mx.array(tokens(rng, 2)).astype(dtype)
    weights = ops.MoeWeights.of(**moe)
    with metal.installed():
        y = ops.moe_decode(x, weights, top_k=3)
        want = ops.moe_decode(x.astype(mx.float32), weights, top_k=3).astype(dtype)
    assert y.dtype == dtype
    assert mx.array_equal(y, want)


def test_no_tokens(rng):
    assert run(tokens(rng, 0), moe_weights.moe(rng, "config-i"), 3).shape == (0, 256)
