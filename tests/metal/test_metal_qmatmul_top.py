"""The head on Metal, in the simulator: norm, rotation, weight and the largest results."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_cases import check, to_numpy
from simt import metal
from top_claims import test_ties_and_numbers_that_are_none, wanted  # noqa: F401

from hadamoe import Instance, metal_products, mlx_gpu, mlx_gpu_products, ops
from hadamoe.verify import layers, samples

pytestmark = pytest.mark.skipif(metal.missing() is not None, reason=str(metal.missing()))


@pytest.mark.parametrize("case", list(layers.qmatmul_top_cases()), ids=str)
def test_cases(case):
    with metal.installed(check=case.expected[0].size < 100):
        check(case)


def run(x: np.ndarray, top: int, **options):
    index, values = None, mx.array(x)
    with metal.installed(**options) as log:
        for launch in metal_products.largest(*x.shape, top):
            values, index = mlx_gpu.run(launch, {"x": values, "from": index})
        return to_numpy((values, index)), log


@pytest.fixture
def run_largest():
    return run


@pytest.mark.parametrize("variant", list(metal.variants()), ids=str)
def test_variants(variant):
    x = np.random.default_rng(1).integers(0, 9, (1, 5000)).astype("f4")
    got, _ = run(x, 4, **variant)
    np.testing.assert_array_equal(got[1], wanted(x, 4)[1])


def test_many_are_sorted():
    x = np.random.default_rng(2).integers(-9, 9, (2, 500)).astype("f4")
    x[:, 7], x[:, 9], x[:, 11] = np.nan, -0.0, np.inf
    got = to_numpy(mlx_gpu_products._sorted(mx.array(x), 500))
    np.testing.assert_array_equal(got[1], wanted(x, 500)[1])


def test_launches_of_a_head():
    """The vocabulary's product with the norm inside, and two for the largest."""
    rng = np.random.default_rng(3)
    w = samples.random_weight(rng, Instance("linear", 8, "bf16"), 5000, 64, kind="gaussian")
    x, gamma = rng.standard_normal((1, 64)).astype("f4"), rng.uniform(0.5, 2, 64).astype("f4")
    want = ops.qmatmul_top(x, w, 5, norm=gamma)
    with metal.installed() as log:
        got = to_numpy(ops.qmatmul_top(mx.array(x), w, 5, norm=mx.array(gamma)))
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert len(log) == 3
