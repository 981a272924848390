"""The mixture of experts on Metal: rounding under every variant of a GPU, traffic, sizes."""

from __future__ import annotations

import mlx.core as mx
import moe_weights
import numpy as np
import pytest
from moe_weights import LAYERS
from simt import metal

from hadamoe import mlx_gpu_moe, ops
from hadamoe.verify import cases, claims

pytestmark = pytest.mark.skipif(metal.missing() is not None, reason=str(metal.missing()))


@pytest.fixture
def rng():
    return np.random.default_rng(8)


@pytest.fixture
def on_metal(monkeypatch):
    """A function that runs a case of `hadamoe.verify` on a simulated device with these options."""
    real, options = ops.moe_decode, {}

    def moe_decode(x, moe, **sizes):
        with metal.installed(**options):
            return np.array(real(mx.array(x), moe, **sizes))

    monkeypatch.setattr(ops, "moe_decode", moe_decode)

    def check(case: claims.Case, **new) -> float:
        options.clear()
        options.update(new)
        return claims.compare(case, case.run())

    return check


@pytest.mark.parametrize("inst", ops.instances(), ids=str)
def test_bound(inst, on_metal):
    """Every instance on Gaussian numbers, with the rotation its format has: f32's bound."""
    assert on_metal(cases.moe_decode_gaussian_case(inst), check=True) > 1e-6


@pytest.mark.parametrize("inst", [("linear", 4, "bf16"), ("codebook", 2, "f16")], ids=str)
@pytest.mark.parametrize("variant", list(metal.variants()), ids=str)
def test_bound_under_variants(inst, variant, on_metal):
    case = next(
        c for c in map(cases.moe_decode_gaussian_case, ops.instances()) if c.instance == inst
    )
    on_metal(case, **variant)


def test_the_bound_finds_a_wrong_weight(on_metal):
    """A result that is 1 + 2^-8 times too large is outside it."""
    case = cases.moe_decode_gaussian_case(ops.instances()[0])
    on_metal(case)
    with pytest.raises(claims.ClaimError, match="wrong in"):
        claims.compare(case, (case.run()[0] * np.float32(1 + 2.0**-8),))


def run(x: np.ndarray, moe: ops.MoeWeights, **options) -> np.ndarray:
    with metal.installed(**options):
        return np.array(ops.moe_decode(mx.array(x), moe, top_k=3))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_the_model(name, rng):
    """2,048 columns, 8 of 256 experts of 512: every weight is read once, in three launches."""
    weights = moe_weights.moe(rng, name, hidden=2048, inner=512, experts=256, distinct=1)
    moe, norm = ops.MoeWeights.of(**weights), np.ones(2048, np.float32)
    x = rng.standard_normal((1, 2048)).astype(np.float32)
    with metal.installed(check=True) as log:
        y = np.array(mlx_gpu_moe.moe_block(mx.array(x), mx.array(norm), moe, top_k=8))
    want = ops.moe_block(x, norm, moe, top_k=8)  # reference.py would unpack all 256 experts
    assert np.linalg.norm(y - want) < 3e-6 * np.linalg.norm(want)
    assert len(log) == 3
    for launch, least in zip(log, moe_weights.read_by_launch(weights, 8), strict=True):
        assert least <= launch.traffic["words"][0] <= 1.05 * least
        assert launch.threadgroup[0] <= 256
        assert launch.threadgroup_bytes <= 16384
        # with MLX's signature; what rotates is 3 KB, less than another launch costs
        assert len(launch.source) < (13000 if "rotated" in launch.name else 11000)
