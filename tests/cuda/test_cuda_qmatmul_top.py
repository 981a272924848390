"""The largest numbers of a row on CUDA, in the simulator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_cases import to_numpy
from simt import cuda, cuda_launch

from hadamoe import cuda_products

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))


def largest(x: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    index = None
    values = torch.from_numpy(x)
    for launch in cuda_products.largest(*x.shape, top):
        values, index = cuda_launch.run(launch, {"x": values, "from": index})
    return to_numpy((values, index))


def wanted(x: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.where(np.isnan(x), -np.inf, x)
    order = np.argsort(-x, -1, kind="stable")[:, :top]
    return np.take_along_axis(x, order, -1), order


@pytest.mark.parametrize(("columns", "top"), [(9, 9), (4097, 5), (300, 64), (70000, 64)])
def test_ties_and_numbers_that_are_none(columns, top):
    rng = np.random.default_rng(columns)
    x = rng.integers(0, 50, (2, columns)).astype("f4")
    x[:, ::3] = np.nan
    x[0, 1::3] = -np.inf
    with cuda.installed(check=columns < 5000) as log:
        got = largest(x, top)
    for a, b in zip(got, wanted(x, top), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(log) == (1 if columns <= 4096 else 2)


@pytest.mark.parametrize("options", [{"contract": False}, {"schedule": "random", "seed": 7}])
def test_another_schedule(options):
    x = np.random.default_rng(1).integers(0, 9, (1, 5000)).astype("f4")
    with cuda.installed(**options):
        got = largest(x, 4)
    np.testing.assert_array_equal(got[1], wanted(x, 4)[1])
