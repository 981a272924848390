"""gguf writes MXFP4 blocks; we read them as they are."""

from __future__ import annotations

import numpy as np
import pytest

from hadamoe import Instance, ops
from hadamoe.weight import Part

from .support import check_product, check_values, weight_of

gguf = pytest.importorskip("gguf", reason="gguf is not installed (pip install 'hadamoe[test]')")
MXFP4 = gguf.GGMLQuantizationType.MXFP4


def test_mxfp4_blocks():
    rng = np.random.default_rng(1)
    w = (rng.standard_normal((16, 320)) * np.exp(4 * rng.standard_normal((16, 1)))).astype("f4")
    blocks = gguf.quants.quantize(w, MXFP4)
    peer = gguf.quants.dequantize(blocks, MXFP4).astype(np.float64)
    weight = weight_of(Part(Instance("e2m1_gguf", 4, "e8m0"), 16, 32, blocks), 320)
    check_values(weight, peer, roundings=0)
    check_product(weight, peer, rng.standard_normal((3, 320)).astype("f4"))


def test_every_scale_that_f32_holds():
    """E8M0 1 to 254 and every code: gguf halves the scale and doubles the numbers, we do not."""
    blocks = np.zeros((254, 17), np.uint8)
    blocks[:, 0] = np.arange(1, 255)
    blocks[:, 1:] = np.arange(16) | np.arange(16)[::-1] << 4
    with np.errstate(over="ignore"):
        peer = gguf.quants.dequantize(blocks, MXFP4).astype(np.float64)
    finite = np.isfinite(peer).all(1)
    weight = weight_of(Part(Instance("e2m1_gguf", 4, "e8m0"), 254, 32, blocks), 32)
    ours = ops.dequantize(weight)
    np.testing.assert_array_equal(ours[finite], peer[finite])
