"""Claims of the largest numbers of a row; a test module brings ``run_largest``.

``run_largest(x, top, **options)``: values and places of the largest of each row, and the launches.
"""

from __future__ import annotations

import numpy as np
import pytest


def wanted(x: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.where(np.isnan(x), -np.inf, x)
    order = np.argsort(-x, -1, kind="stable")[:, :top]
    return np.take_along_axis(x, order, -1), order


@pytest.mark.parametrize(("columns", "top"), [(9, 9), (4097, 5), (300, 64), (70000, 64)])
def test_ties_and_numbers_that_are_none(columns, top, run_largest):
    rng = np.random.default_rng(columns)
    x = rng.integers(0, 50, (2, columns)).astype("f4")
    x[:, ::3] = np.nan
    x[0, 1::3] = -np.inf
    got, log = run_largest(x, top, check=columns < 5000)
    for a, b in zip(got, wanted(x, top), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(log) == (1 if columns <= 4096 else 2)
