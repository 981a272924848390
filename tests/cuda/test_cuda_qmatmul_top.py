"""The largest numbers of a row on CUDA, in the simulator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_cases import to_numpy
from simt import cuda, cuda_launch
from top_claims import test_ties_and_numbers_that_are_none, wanted  # noqa: F401

from hadamoe import cuda_products

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))


def run(x: np.ndarray, top: int, **options):
    index, values = None, torch.from_numpy(x)
    with cuda.installed(**options) as log:
        for launch in cuda_products.largest(*x.shape, top):
            values, index = cuda_launch.run(launch, {"x": values, "from": index})
    return to_numpy((values, index)), log


@pytest.fixture
def run_largest():
    return run


@pytest.mark.parametrize("options", [{"contract": False}, {"schedule": "random", "seed": 7}])
def test_another_schedule(options):
    x = np.random.default_rng(1).integers(0, 9, (1, 5000)).astype("f4")
    got, _ = run(x, 4, **options)
    np.testing.assert_array_equal(got[1], wanted(x, 4)[1])
