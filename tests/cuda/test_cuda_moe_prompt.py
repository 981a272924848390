"""A prompt's mixture of experts on CUDA: chosen once, pairs in the order of their experts."""

from __future__ import annotations

import moe_weights
import numpy as np
import pytest
from cuda_cases import FRONT, to_numpy, to_torch
from moe_claims import (  # noqa: F401
    distance,
    test_a_token_of_a_prompt_that_is_no_number,
    tokens,
)
from moe_weights import LAYERS
from simt import cuda

from hadamoe import cuda_moe, cuda_products, cuda_tiles, gpu_calls, ops, reference
from hadamoe.verify.samples import plain_part
from hadamoe.weight import Weight

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))


@pytest.fixture
def rng():
    return np.random.default_rng(9)


def run(x, moe, top_k=3, norm=None, **options):
    gamma = norm if norm is None else (to_torch(norm), 1e-6)
    with cuda.installed(**options):
        weights = ops.MoeWeights.of(**moe)
        sizes = {"top_k": top_k, "normalize": True, "norm": gamma}
        return to_numpy(gpu_calls.moe(FRONT, to_torch(x), weights, **sizes))


@pytest.fixture
def run_moe():
    return run


@pytest.mark.parametrize("name", LAYERS)
def test_near_the_reference(name, rng):
    moe, x = moe_weights.moe(rng, name), tokens(rng, cuda_moe.FEW + 3)
    norm = rng.uniform(0.5, 1.5, 256).astype(np.float32)
    y = run(x, moe, norm=norm, check=True)
    assert distance(y, reference.moe_block(x, norm, moe, top_k=3)) < 3e-6
    assert distance(y, reference.moe_block(x, norm, moe, top_k=2)) > 1e-5


@pytest.mark.parametrize("name", ["config-i", "jangtq2"])
def test_too_few_pairs_for_tiles(name, rng, monkeypatch):
    monkeypatch.setattr(cuda_products, "in_tiles", lambda *_: False)
    moe, x = moe_weights.moe(rng, name), tokens(rng, cuda_moe.FEW + 1)
    assert distance(run(x, moe, check=True), reference.moe_decode(x, moe, top_k=3)[0]) < 3e-6


def test_a_token_depends_on_nothing_else(rng):
    """Nor do its bits on which others share its experts."""
    moe, x = moe_weights.moe(rng, "mxfp4"), tokens(rng, 20)
    want = run(x, moe)
    np.testing.assert_array_equal(run(x[::-1].copy(), moe)[::-1], want)
    np.testing.assert_array_equal(run(x[3:13], moe), want[3:13])


@pytest.mark.parametrize(("few", "schedules"), [(cuda_tiles.FEW, 1), (0, 2)])
def test_one_schedule_where_tiles_have_one_size(few, schedules, rng, monkeypatch):
    """Those of 32-bit numbers have 32 tokens however many there are, others then 64."""
    monkeypatch.setattr(cuda_tiles, "FEW", few)
    moe = moe_weights.moe(rng, "w4a16")
    down = [plain_part(0.05 * rng.standard_normal((256, 128))) for _ in range(6)]
    moe["down"] = Weight(128, tuple((part,) for part in down))
    x = tokens(rng, 20)
    with cuda.installed() as log:
        weights = ops.MoeWeights.of(**moe)
        y = gpu_calls.moe(FRONT, to_torch(x), weights, top_k=3, normalize=True)
    assert [launch.name for launch in log].count("qmatmul_schedule") == schedules
    assert distance(to_numpy(y), reference.moe_decode(x, moe, top_k=3)[0]) < 1e-4


def test_longer_than_a_piece(rng, monkeypatch):
    monkeypatch.setattr(cuda_moe, "MANY", 10)
    moe = moe_weights.moe(rng, "w4a16", hidden=64, inner=32)
    x = tokens(rng, 20, 64)
    assert distance(run(x, moe, 2), reference.moe_decode(x, moe, top_k=2)[0]) < 3e-6
