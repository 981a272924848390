"""The runner itself: a claim it cannot break proves nothing."""

from __future__ import annotations

import numpy as np
import pytest

from hadamoe import _cpu
from hadamoe.errors import ContractError

from .backend import Crashed
from .conftest import start


def read_bytes(native, data: np.ndarray, block: int = 64) -> np.ndarray:
    sums = np.zeros(-(-data.size // block), np.uint64)
    native.call("read_bytes", [data], [sums], [block], [])
    return sums


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("size", [0, 1, 63, 64, 4096, 10001])
def test_every_isa_reads_every_byte_once(runner, size, before):
    data = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    runner.set_guard(before)
    for isa in runner.isas():
        runner.set_isa(isa)
        np.testing.assert_array_equal(read_bytes(runner, data, 256), read_bytes(_cpu, data, 256))
    runner.set_guard(False)


def test_contract_errors_come_through(runner):
    with pytest.raises(ContractError) as e:
        read_bytes(runner, np.zeros(9, np.float32))
    assert str(e.value) == "read_bytes: bytes is f32, needs u8 [n=9]"


def test_a_read_behind_an_array_is_found():
    """The guard page works: a shape larger than the bytes sent makes the kernel read past them."""
    runner = start("sanitized")
    runner.cut = 64
    with pytest.raises(Crashed, match=r"SEGV|AddressSanitizer"):
        read_bytes(runner, np.zeros(4096 + 64, np.uint8))


def test_the_pool_has_no_race(racing):
    """Jobs of every size, pools resized between them, workers parked and spinning."""
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, 64 * 200, np.uint8)
    for threads in (2, 3, 1, 4):
        racing.set_threads(threads)
        for count in rng.integers(1, 200, 60):
            want = data[: 64 * count].view(np.uint64).reshape(-1, 8).sum(1)
            np.testing.assert_array_equal(read_bytes(racing, data[: 64 * count]), want)
