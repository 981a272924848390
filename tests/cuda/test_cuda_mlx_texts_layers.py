"""Every text that MLX would compile for experts and the gated delta rule on CUDA."""

from __future__ import annotations

from functools import partial

import numpy as np
import nvrtc
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
import moe_weights  # noqa: E402
from mlx_texts import compiles, kernels_of, texts_of  # noqa: E402
from simt import cuda_launch  # noqa: E402

from hadamoe import mlx, ops  # noqa: E402
from hadamoe.verify import layers  # noqa: E402

pytestmark = [
    pytest.mark.simulator,  # of an MLX that has CUDA
    pytest.mark.skipif(nvrtc.folder() is None, reason="nvidia-cuda-nvrtc is not installed"),
]


def experts(name, inner=512):
    made = moe_weights.moe(np.random.default_rng(0), name, hidden=256, inner=inner, experts=4)
    packed = ops.MoeWeights.of(**made)
    mlx.moe_block(mx.zeros((1, 256)), mx.ones(256), packed, top_k=2)
    if name == "jangtq2":
        mlx.moe_decode(mx.zeros((1, 256)), packed, top_k=2)
        mlx.moe_block(mx.zeros((20, 256)), mx.ones(256), packed, top_k=2)


def gated_delta():
    for tokens in (1, 5):
        for d in (32, 256):
            made = layers.gated_delta_arrays(np.random.default_rng(0), 3, tokens, 2, 4, d, d, 4)
            arrays = list(map(mx.array, made.values()))
            sizes = {"heads": (2, 4), "head_dims": (d, d)}
            mlx.gated_delta(*arrays, **sizes)
            mlx.gated_delta(*arrays, **sizes, lengths=mx.array([1, 1, 0]))
            mlx.gated_delta(*arrays, **sizes, mask=mx.zeros((3, tokens), mx.bool_))


CALLS = {
    **{name: partial(experts, name) for name in moe_weights.LAYERS},
    "wide experts": partial(experts, "jangtq4", 1024),
    "gated delta": gated_delta,
}


@pytest.mark.parametrize("name", CALLS)
def test_nvrtc_compiles(name):
    compiles(texts_of(CALLS[name]))


def test_every_kernel_is_among_them():
    found = kernels_of(CALLS.values())
    assert found >= {name for name in cuda_launch.compiled() if name.startswith(("moe", "delta"))}
