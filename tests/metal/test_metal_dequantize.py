"""Rows of a weight as numbers on Metal, in the simulator: the CPU's bits."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_cases import check, to_numpy
from simt import metal

from hadamoe import Instance, Rotation, ops
from hadamoe.verify import cases, samples

pytestmark = pytest.mark.skipif(metal.missing() is not None, reason=str(metal.missing()))


@pytest.mark.parametrize("inst", ops.instances(), ids=str)
def test_exact(inst):
    with metal.installed(check=True, ftz=False):
        for case in list(cases.dequantize_cases(inst))[::3]:
            check(case)
    with metal.installed(contract=True):
        for case in list(cases.dequantize_cases(inst))[1:2]:
            check(case)


@pytest.mark.parametrize("variant", list(metal.variants()), ids=str)
def test_variants(variant):
    """Two roundings in one order: no freedom a GPU has changes a bit."""
    w = samples.random_weight(
        np.random.default_rng(3), Instance("linear", 5, "f32"), 9, 192, kind="gaussian"
    )
    want = ops.dequantize(w)
    with metal.installed(**variant):
        y = ops.dequantize(w, mx.arange(9))
    np.testing.assert_array_equal(to_numpy(y), want)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("block", [128, None])
def test_a_rotation_is_undone(block, dtype):
    rng = np.random.default_rng(4)
    w = samples.random_weight(
        rng, Instance("codebook", 4, "f32"), [8, 3], 384, experts=2, kind="gaussian"
    )
    signs = (rng.choice(np.float32([-1, 1]), n) for n in ((128, 128) if block else (384, 384)))
    w = replace(w, rotation=Rotation(block, *signs), in_features=300 if block else 384)
    rows = np.array([[21, 3], [8, 0]])
    want = ops.dequantize(w, rows, dtype=np.dtype(dtype))
    with metal.installed(check=True):
        y = ops.dequantize(w, mx.array(rows), dtype=np.dtype(dtype))
    assert y.shape == want.shape
    np.testing.assert_array_equal(to_numpy(y), want)


def test_bfloat16():
    w = samples.random_weight(
        np.random.default_rng(5), Instance("e2m1_gguf", 4, "e8m0"), 9, 64, kind="gaussian"
    )
    with metal.installed():
        y = ops.dequantize(w, mx.array([7, 2]), dtype=mx.bfloat16)
    assert y.dtype == mx.bfloat16
    want = mx.array(ops.dequantize(w, np.array([7, 2]))).astype(mx.bfloat16)
    np.testing.assert_array_equal(to_numpy(y), to_numpy(want))
