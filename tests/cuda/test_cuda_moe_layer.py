"""A layer of the published models on CUDA: three launches, every code read once."""

from __future__ import annotations

import moe_weights
import numpy as np
import pytest
from cuda_cases import FRONT, to_numpy, to_torch
from moe_weights import LAYERS
from simt import cuda

from hadamoe import gpu_calls, ops

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_the_model(name):
    """2,048 columns, 8 of 256 experts of 512."""
    rng = np.random.default_rng(8)
    weights = moe_weights.moe(rng, name, hidden=2048, inner=512, experts=256, distinct=1)
    moe, norm = ops.MoeWeights.of(**weights), np.ones(2048, np.float32)
    x = rng.standard_normal((1, 2048)).astype(np.float32)
    with cuda.installed(check=True) as log:
        sizes = {"top_k": 8, "normalize": True, "norm": (to_torch(norm), 1e-6)}
        y = to_numpy(gpu_calls.moe(FRONT, to_torch(x), moe, **sizes))
    want = ops.moe_block(x, norm, moe, top_k=8)  # reference.py would unpack all 256 experts
    assert np.linalg.norm(y - want) < 3e-6 * np.linalg.norm(want)
    assert len(log) == 3
    for launch, least in zip(log, moe_weights.read_by_launch(weights, 8), strict=True):
        # every lane reads the scales and the codebook it needs, mostly from the nearest cache
        assert least <= launch.traffic["words"][0] <= 1.8 * least
        assert launch.threadgroup_bytes <= 48 * 1024
