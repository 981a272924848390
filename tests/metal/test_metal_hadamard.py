"""The Hadamard rotation's Metal kernel in the simulator: reference.hadamard, bit for bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_cases import check, to_numpy
from simt import metal

from hadamoe import ops, reference
from hadamoe.verify import cases

pytestmark = pytest.mark.skipif(metal.missing() is not None, reason=str(metal.missing()))


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_cases(dtype):
    with metal.installed(check=True) as log:
        for case in cases.hadamard_cases(dtype=dtype):
            check(case)
    assert max(launch.threadgroup_bytes for launch in log) <= 16384
    assert all(np.prod(launch.threadgroup) <= 256 for launch in log)


@pytest.mark.parametrize("columns", [7, 255, 257, 4097, 6000, 12288, 16383])
def test_powers_of_two(columns):
    rng = np.random.default_rng(columns)
    x, pre = (
        rng.standard_normal((1, columns)).astype("f4"),
        rng.choice(np.float32([-1, 1]), columns),
    )
    with metal.installed(check=True) as log:
        y = ops.hadamard(mx.array(x), pre=mx.array(pre))
    np.testing.assert_array_equal(to_numpy(y), reference.hadamard(x, pre=pre))
    assert len(log) == (1 if columns < 8192 else 2)


@pytest.mark.parametrize("block", [1, 2, 32, 64, 256, 512, 4096, 8192])
def test_blocks(block):
    rng = np.random.default_rng(block)
    x = rng.standard_normal((2, 2 * block + 1)).astype("f4")
    post = rng.choice(np.float32([-1, 1]), 3 * block)
    with metal.installed():
        y = ops.hadamard(mx.array(x), block=block, post=mx.array(post))
    np.testing.assert_array_equal(to_numpy(y), reference.hadamard(x, block=block, post=post))


@pytest.mark.parametrize("variant", list(metal.variants()), ids=str)
def test_variants(variant):
    """Sums and differences in one order: no freedom a GPU has changes a bit."""
    x = np.random.default_rng(1).standard_normal((2, 768)).astype("f4")
    with metal.installed(**variant):
        y = ops.hadamard(mx.array(x))
    np.testing.assert_array_equal(to_numpy(y), reference.hadamard(x))


def test_bfloat16():
    x = mx.array(np.random.default_rng(1).standard_normal((3, 2, 256)).astype("f4"))
    x = x.astype(mx.bfloat16)
    want = reference.hadamard(to_numpy(x), block=128)
    with metal.installed():
        y = ops.hadamard(x, block=128)
    assert y.dtype == mx.bfloat16
    np.testing.assert_array_equal(to_numpy(y), to_numpy(mx.array(want).astype(mx.bfloat16)))
