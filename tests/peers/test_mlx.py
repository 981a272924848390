"""MLX quantises; we read its arrays as they are."""

from __future__ import annotations

import numpy as np
import pytest

from hadamoe import Instance, ops
from hadamoe.verify import bounds, claims
from hadamoe.weight import Part

from .support import check_product, check_values, raw, weight_of

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")

ROWS, COLUMNS = 24, 384


def stored(a) -> np.ndarray:
    """An MLX array's bits: bf16 and f16 as u16."""
    return np.array(a.view(mx.uint16) if a.dtype in (mx.bfloat16, mx.float16) else a)


def f64(a) -> np.ndarray:
    return np.array(a.astype(mx.float32)).astype(np.float64)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(3)
    w = (rng.standard_normal((ROWS, COLUMNS)) * np.exp(rng.standard_normal((ROWS, 1)))).astype("f4")
    return w, rng.standard_normal((5, COLUMNS)).astype("f4")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine(data, bits, group, dtype):
    w, x = data
    codes, scales, biases = mx.quantize(mx.array(w).astype(getattr(mx, dtype)), group, bits)
    inst = Instance("linear", bits, {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype])
    part = Part(inst, ROWS, group, raw(np.array(codes)), stored(scales), stored(biases))
    weight = weight_of(part, COLUMNS)
    wide = [a.astype(mx.float32) for a in (scales, biases)]
    peer = f64(mx.dequantize(codes, *wide, group, bits))
    check_values(weight, peer)
    check_product(weight, peer, x)
    # and MLX's own product on the same arrays
    theirs = f64(mx.quantized_matmul(mx.array(x), codes, *wide, True, group, bits))
    allowed = 2 * bounds.qmatmul_bound(x.astype(np.float64), weight, theirs, "f32")
    assert (np.abs(ops.qmatmul(x, weight) - theirs) <= allowed).all()


def test_mxfp4(data):
    w, x = data
    codes, scales = mx.quantize(mx.array(w), 32, 4, mode="mxfp4")
    part = Part(Instance("e2m1", 4, "e8m0"), ROWS, 32, raw(np.array(codes)), np.array(scales))
    weight = weight_of(part, COLUMNS)
    peer = f64(mx.dequantize(codes, scales, group_size=32, bits=4, mode="mxfp4"))
    check_values(weight, peer, roundings=0)
    check_product(weight, peer, x)


@pytest.mark.parametrize("size", [2, 64, 512, 2048, 16384])
def test_hadamard(size):
    x = np.random.default_rng(size).standard_normal((3, size)).astype("f4")
    theirs = f64(mx.hadamard_transform(mx.array(x)))
    steps = size.bit_length()
    bound = 2 * claims.gamma(steps + 2) * np.abs(x).sum(-1, keepdims=True) / np.sqrt(size)
    assert (np.abs(ops.hadamard(x) - theirs) <= bound).all()
