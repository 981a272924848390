"""The mixture of experts on CUDA: exact where nothing rounds, right in every published format."""

from __future__ import annotations

import moe_weights
import numpy as np
import pytest
from cuda_cases import FRONT, to_numpy, to_torch
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
from simt import cuda

from hadamoe import gpu_calls, ops, reference
from hadamoe.verify import cases, claims
from hadamoe.weight import Weight

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))


def on_cuda(x, moe, *, top_k, normalize=True, norm=None, **options):
    """`ops.moe_decode` through launches in the simulator; checked unless told otherwise."""
    gamma = norm if norm is None else (to_torch(norm), 1e-6)
    with cuda.installed(**{"check": True} | options):
        sizes = {"top_k": top_k, "normalize": normalize, "norm": gamma}
        return to_numpy(gpu_calls.moe(FRONT, to_torch(x), moe, **sizes))


def run(x: np.ndarray, moe: dict[str, Weight], top_k: int, **options) -> np.ndarray:
    return on_cuda(x, ops.MoeWeights.of(**moe), top_k=top_k, **options)


@pytest.fixture
def run_moe():
    return run


@pytest.mark.parametrize("inst", ops.instances(), ids=str)
def test_exact(inst, monkeypatch):
    """Every instance in gate_up and in down, one token and several: no bit is wrong."""
    monkeypatch.setattr(ops, "moe_decode", on_cuda)
    several, one, *_ = cases.moe_decode_cases(inst)
    for case in (several, one):
        claims.compare(case, case.run())


@pytest.mark.parametrize("inst", ops.instances(), ids=str)
def test_bound(inst, monkeypatch):
    """Every instance on Gaussian numbers, with the rotation its format has: f32's bound."""
    monkeypatch.setattr(ops, "moe_decode", on_cuda)
    case = cases.moe_decode_gaussian_case(inst)
    y = case.run()
    assert claims.compare(case, y) > 1e-6
    with pytest.raises(claims.ClaimError, match="wrong in"):
        claims.compare(case, (y[0] * np.float32(1 + 2.0**-8),))


@pytest.mark.parametrize("name", ["config-i", "tq-apex2", "jangtq2"])
def test_block(name, rng):
    """The norm in front and the residual behind are inside; three launches."""
    moe = moe_weights.moe(rng, name)
    x, norm = tokens(rng, 3), rng.uniform(0.5, 1.5, 256).astype(np.float32)
    weights, gamma = ops.MoeWeights.of(**moe), (to_torch(norm), 1e-6)
    with cuda.installed(check=True) as log:
        y = gpu_calls.moe(FRONT, to_torch(x), weights, top_k=3, normalize=True, norm=gamma)
    want = reference.moe_block(x, norm, moe, top_k=3)
    assert distance(to_numpy(y), want) < 3e-6
    assert distance(to_numpy(y), want - x) > 1e-3
    assert len(log) == 3


def test_as_many_experts_as_a_warp_has_lanes(rng):
    moe = moe_weights.moe(rng, "config-i", experts=40, distinct=7)
    x = tokens(rng, 1)
    assert distance(run(x, moe, 32), reference.moe_decode(x, moe, top_k=32)[0]) < 3e-6


def test_no_tokens(rng):
    assert run(tokens(rng, 0), moe_weights.moe(rng, "config-i"), 3).shape == (0, 256)
