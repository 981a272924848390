"""A prompt's mixture of experts on Metal: tokens of one expert read its codes together."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import moe_weights
import numpy as np
import pytest
from moe_claims import (  # noqa: F401
    distance,
    test_a_token_of_a_prompt_that_is_no_number,
    tokens,
)
from moe_weights import LAYERS
from simt import metal

from hadamoe import metal_moe, metal_products, ops, reference
from hadamoe.metal_products import TOKENS
from hadamoe.verify import cases, claims
from hadamoe.weight import Weight, stack_experts

pytestmark = pytest.mark.skipif(metal.missing() is not None, reason=str(metal.missing()))


@pytest.fixture
def rng():
    return np.random.default_rng(9)


@pytest.fixture
def together(monkeypatch):
    """As between a few tokens and so many that tiles are filled (`metal_products.in_tiles`)."""
    monkeypatch.setattr(metal_products, "in_tiles", lambda *_: False)


def run(x: np.ndarray, moe: dict[str, Weight], top_k: int = 3, **options) -> np.ndarray:
    with metal.installed(**options):
        return np.array(ops.moe_decode(mx.array(x), ops.MoeWeights.of(**moe), top_k=top_k))


@pytest.fixture
def run_moe(together):
    return run


@pytest.mark.parametrize("inst", ops.instances(), ids=str)
def test_exact(inst, together, monkeypatch):
    """19 tokens, every instance in down: no bit is wrong."""
    real = ops.moe_decode

    def moe_decode(x, moe, **sizes):
        with metal.installed(check=True):
            return np.array(real(mx.array(x), moe, **sizes))

    monkeypatch.setattr(ops, "moe_decode", moe_decode)
    *_, prompt = cases.moe_decode_cases(inst)
    claims.compare(prompt, prompt.run())


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_near_the_reference(name, tiles, rng, monkeypatch):
    monkeypatch.setattr(metal_products, "in_tiles", lambda *_: tiles)
    moe, x = moe_weights.moe(rng, name), tokens(rng, metal_moe.FEW + 3)
    norm = rng.uniform(0.5, 1.5, 256).astype(np.float32)
    with metal.installed(check=True):
        weights = ops.MoeWeights.of(**moe)
        y = np.array(ops.moe_block(mx.array(x), mx.array(norm), weights, top_k=3))
    assert distance(y, reference.moe_block(x, norm, moe, top_k=3)) < 3e-6
    assert distance(y, reference.moe_block(x, norm, moe, top_k=2)) > 1e-5


def test_experts_of_two_widths_and_a_padded_inner_state(together, rng):
    moe, other = (moe_weights.moe(rng, "tq-apex2", inner=96) for _ in range(2))
    down = [
        moe_weights.matrix(rng, replace_bits(LAYERS["tq-apex2"].down, 3 + e % 2), 256, 128)
        for e in range(6)
    ]
    moe["down"] = replace(stack_experts(down), rotation=moe["gate_up"].rotation)
    moe["shared_down"] = moe_weights.matrix(rng, LAYERS["w4a16"].down, 256, 96)
    moe["gate_up"] = replace(
        moe["gate_up"], parts=moe["gate_up"].parts[:3] + other["gate_up"].parts[3:]
    )
    x = tokens(rng, 12)
    assert distance(run(x, moe, check=True), reference.moe_decode(x, moe, top_k=3)[0]) < 3e-6


def replace_bits(stored: moe_weights.Stored, bits: int) -> moe_weights.Stored:
    return stored._replace(instance=stored.instance._replace(bits=bits))


def test_codes_are_read_once_for_several_tokens(together, rng):
    """A group has `TOKENS` slots in the order of their experts, and reads each expert once."""
    moe, x = moe_weights.moe(rng, "w4a16", experts=16), tokens(rng, 40)
    expert = np.sort(reference.moe_decode(x, moe, top_k=4)[1].reshape(-1))
    pieces = [expert[i : i + TOKENS] for i in range(0, len(expert), TOKENS)]
    runs = sum(len(np.unique(piece)) for piece in pieces)
    assert runs < len(expert) / 3
    with metal.installed(check=True) as log:
        ops.moe_decode(mx.array(x), ops.MoeWeights.of(**moe), top_k=4)
    grouped = [launch for launch in log if "moe_experts" in launch.name]
    for launch, role in zip(grouped, ("gate_up", "down"), strict=True):
        assert launch.traffic["words"][0] == moe_weights.nbytes(moe[role], runs)
        assert launch.threadgroup[0] <= 256
        assert launch.threadgroup_bytes == 0


@pytest.mark.parametrize("name", ["config-i", "jangtq2"])
def test_variants(name, together, rng):
    moe, x = moe_weights.moe(rng, name), tokens(rng, 9)
    want = reference.moe_decode(x, moe, top_k=3)[0]
    for variant in metal.variants():
        assert distance(run(x, moe, **variant), want) < 3e-6


def test_a_token_depends_on_nothing_else(together, rng):
    """Nor do its bits on which others share its experts."""
    moe, x = moe_weights.moe(rng, "mxfp4"), tokens(rng, 30)
    want = run(x, moe)
    np.testing.assert_array_equal(run(x[::-1].copy(), moe)[::-1], want)
    np.testing.assert_array_equal(run(x[7:19], moe), want[7:19])
    for schedule in ("descending", "random"):
        np.testing.assert_array_equal(run(x, moe, schedule=schedule), want)


def test_longer_than_a_piece(rng):
    moe = moe_weights.moe(rng, "w4a16", hidden=64, inner=32)
    x = tokens(rng, metal_moe.MANY + 3, 64)
    assert distance(run(x, moe, 2), reference.moe_decode(x, moe, top_k=2)[0]) < 3e-6
