"""Every op is tested on every instruction set this machine runs."""

from __future__ import annotations

import numpy as np
import pytest

from hadamoe import ops


@pytest.fixture(params=ops.isas())
def isa(request):
    """Runs the test once per instruction set."""
    before = ops.isa()
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(before)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
