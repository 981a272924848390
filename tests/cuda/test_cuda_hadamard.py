"""The Hadamard rotation's CUDA kernels in the simulator: reference.hadamard, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_cases import FRONT, to_numpy, to_torch
from simt import cuda

from hadamoe import gpu_calls, reference

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))


def rotated(x, block=None, pre=None, post=None, check=True, **options):
    with cuda.installed(check=check, **options):
        return gpu_calls.hadamard(FRONT, to_torch(x), block=block, pre=pre, post=post)


def signs(rng, count):
    return rng.choice(np.float32([-1, 1]), count)


@pytest.mark.parametrize("columns", [7, 32, 255, 257, 768, 2048, 4097, 6000, 12288, 16383])
def test_powers_of_two(columns):
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((2, columns)).astype("f4")
    pre = signs(rng, columns)
    want = reference.hadamard(x, pre=pre)
    np.testing.assert_array_equal(to_numpy(rotated(x, pre=pre, check=columns < 8192)), want)


@pytest.mark.parametrize("block", [1, 2, 32, 64, 128, 256, 512, 4096, 8192])
def test_blocks(block):
    rng = np.random.default_rng(block)
    x = rng.standard_normal((2, 2 * block + 1)).astype("f4")
    post = signs(rng, 3 * block)
    want = reference.hadamard(x, block=block, post=post)
    np.testing.assert_array_equal(to_numpy(rotated(x, block, post=post, check=False)), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype):
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((3, 2, 256)).astype("f4"))
    x = x.to(dtype)
    want = torch.from_numpy(reference.hadamard(x.float().numpy(), block=128)).to(dtype)
    assert torch.equal(rotated(x, 128), want)


@pytest.mark.parametrize("options", [{"contract": False}, {"schedule": "random", "seed": 7}])
def test_no_freedom_of_a_compiler_changes_a_bit(options):
    x = np.random.default_rng(1).standard_normal((2, 768)).astype("f4")
    got = to_numpy(rotated(x, check=False, **options))
    np.testing.assert_array_equal(got, reference.hadamard(x))


def test_a_norm_in_front():
    rng = np.random.default_rng(5)
    x, gamma = rng.standard_normal((2, 512)).astype("f4"), rng.standard_normal(512).astype("f4")
    steps = FRONT.plans.products.hadamard(2, 512, "float32", block=128, pre=0, post=0, norm=1e-6)
    with cuda.installed(check=True):
        arrays = {"x": to_torch(x), "gamma": to_torch(gamma)}
        got = to_numpy(gpu_calls.run_all(FRONT, steps, arrays))
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * gamma
    np.testing.assert_allclose(got, reference.hadamard(normed, block=128), atol=1e-5)
