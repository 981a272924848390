"""Rows of a weight as numbers on CUDA, in the simulator: the CPU's bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_cases import FRONT, to_numpy
from simt import cuda

from hadamoe import Instance, gpu_calls, ops
from hadamoe.verify import cases, samples

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))


def rows_of(w, rows, dtype: str = "float32") -> torch.Tensor:
    weight = gpu_calls.resident(FRONT, ops.pack(w))
    return gpu_calls.dequantize(FRONT, weight, torch.tensor(rows, dtype=torch.int32), dtype)


@pytest.mark.parametrize("inst", ops.instances(), ids=str)
@pytest.mark.parametrize("kind", ["integer", "gaussian"])
def test_bits(inst, kind):
    """Rows in any order, of experts whose parts are cut anywhere."""
    rng = np.random.default_rng(3)
    for columns in cases.columns_of(inst):
        for group in cases.groups_of(inst, columns):
            w = samples.random_weight(rng, inst, [7, 4], columns, group=group, experts=3, kind=kind)
            rows = rng.integers(0, 33, 7)
            with cuda.installed(check=kind == "integer"):
                got = rows_of(w, rows)
            np.testing.assert_array_equal(to_numpy(got), ops.dequantize(w, rows))


def test_no_freedom_of_a_compiler_changes_a_bit():
    rng = np.random.default_rng(3)
    w = samples.random_weight(rng, Instance("linear", 5, "f32"), 9, 192, kind="gaussian")
    for options in ({"contract": True}, {"contract": False}, {"schedule": "random", "seed": 1}):
        with cuda.installed(**options):
            got = rows_of(w, np.arange(9))
        np.testing.assert_array_equal(to_numpy(got), ops.dequantize(w))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits(dtype):
    """f32 rounded once. A row that is not there is the last one."""
    rng = np.random.default_rng(5)
    w = samples.random_weight(rng, Instance("e2m1_gguf", 4, "e8m0"), 9, 64, kind="gaussian")
    with cuda.installed(check=True):
        got = rows_of(w, [[7, 2], [9, -1]], dtype)
    want = torch.from_numpy(ops.dequantize(w, np.array([[7, 2], [8, 8]])))
    assert torch.equal(got, want.to(getattr(torch, dtype)))
