"""bf16 in and out of the ops, on every runner: exact inputs, results rounded once, to even."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest

from hadamoe import ops, reference
from hadamoe.verify import cases, claims, samples


@contextmanager
def bf16(runner):
    """numpy's f16 arrays carry bf16 bits to and from the runner."""
    runner.half_is_bf16 = True
    try:
        with claims.native(claims.Poisoned(runner)):
            yield
    finally:
        runner.half_is_bf16 = False


def stored(x: np.ndarray) -> np.ndarray:
    return samples.to_bf16(x).view(np.float16)


def read(y: np.ndarray) -> np.ndarray:
    return samples.from_bf16(y.view(np.uint16))


def once(x: np.ndarray) -> np.ndarray:
    return read(stored(x.astype(np.float32)))


@pytest.mark.parametrize("inst", ops.instances(), ids=str)
def test_qmatmul(runner, inst):
    rng = np.random.default_rng(5)
    columns = cases.columns_of(inst)[-1]
    w = samples.random_weight(rng, inst, 19, columns)
    x = rng.integers(-4, 5, (3, columns)).astype(np.float32)
    want = once(x @ samples.values(w)[0].T)
    for isa in runner.isas():
        runner.set_isa(isa)
        with bf16(runner):
            np.testing.assert_array_equal(read(ops.qmatmul(stored(x), w)), want)


@pytest.mark.parametrize("inst", ops.instances(), ids=str)
def test_dequantize(runner, inst):
    columns = cases.columns_of(inst)[-1]
    w = samples.random_weight(np.random.default_rng(6), inst, 5, columns, kind="gaussian")
    want = once(reference.dequantize(w, np.arange(5)))
    for isa in runner.isas():
        runner.set_isa(isa)
        with bf16(runner):
            np.testing.assert_array_equal(read(ops.dequantize(w, dtype=np.float16)), want)


def test_hadamard(runner):
    x = once(np.random.default_rng(7).standard_normal((3, 300)))
    for isa in runner.isas():
        runner.set_isa(isa)
        for block in (None, 128):
            want = once(reference.hadamard(x, block=block or 0))
            with bf16(runner):
                np.testing.assert_array_equal(read(ops.hadamard(stored(x), block=block)), want)
