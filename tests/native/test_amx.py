"""AMX's kernels give AVX-512's bits: its instructions run by the processor, or by amx_traps.cpp."""

from __future__ import annotations

import numpy as np
import pytest

from hadamoe import ops
from hadamoe.verify import claims, samples

from .conftest import start

#: Numbers a byte holds: all others take the same path on both.
INSTANCES = [i for i in ops.instances() if i.table not in ("plain", "codebook")]
#: Units of 32, 64 and 128 columns, groups of several, one scale a row, tails, more than one panel.
SHAPES = [(96, 32), (320, 64), (256, 128), (384, 128), (480, 96), (768, 384), (40, 40), (300, 300),
          (1536, 384), (2208, 96), (2085, 2085)]  # fmt: skip


@pytest.fixture(scope="module", params=["amx", "sanitized"])
def both(request):
    """A runner of AVX-512 and AMX; of neither where the processor lacks the first."""
    runner = start(request.param)
    assert ("amx" in runner.isas()) == ("avx512" in ops.isas())
    yield runner
    runner.close()


def bits(runner, x: np.ndarray, weight, expert=None) -> list[bytes]:
    """The results of each of the two instruction sets."""
    found = []
    for isa in ("avx512", "amx"):
        if isa not in runner.isas():
            continue
        runner.set_isa(isa)
        with claims.native(claims.Poisoned(runner)):
            found.append(ops.qmatmul(x, weight, expert=expert).tobytes())
    return found


def same(found: list[bytes]) -> bool:
    return len(set(found)) <= 1


def shapes(inst):
    for columns, group in SHAPES:
        if inst.table != "e2m1_gguf":
            yield columns, group
        elif columns % 32 == 0:
            yield columns, 32


@pytest.mark.parametrize("inst", INSTANCES, ids=str)
def test_every_shape(both, inst):
    rng = np.random.default_rng(0)
    tokens, rows = (9, 16, 17, 33), (1, 15, 16, 17, 32, 33, 50)
    for i, (columns, group) in enumerate(shapes(inst)):
        w = samples.random_weight(
            rng, inst, [rows[i % 7], rows[(i + 3) % 7]], columns, group=group, kind="gaussian"
        )
        x = rng.standard_normal((tokens[i % 4], columns)).astype(np.float32)
        x[1, :] *= 1e-30
        x[2, columns // 2] = 300
        assert same(bits(both, x, w)), (columns, group)
        assert same(bits(both, x.astype(np.float16), w)), (columns, group)


@pytest.mark.parametrize("count", [7, 8, 127, 128, 129, 290])
def test_every_number_of_tokens(both, count):
    """Below the least number for tiles, full blocks of 128, and what is left."""
    rng = np.random.default_rng(1)
    inst = next(i for i in INSTANCES if i.table == "linear" and i.bits == 4)
    w = samples.random_weight(rng, inst, 20, 64, group=32, kind="gaussian")
    assert same(bits(both, rng.standard_normal((count, 64)).astype(np.float32), w))


def test_a_width_whose_tokens_fill_the_scratch_memory(both):
    rng = np.random.default_rng(2)
    inst = next(i for i in INSTANCES if i.table == "linear" and i.bits == 2)
    w = samples.random_weight(rng, inst, 4, 20480, group=128, kind="gaussian")
    assert same(bits(both, rng.standard_normal((18, 20480)).astype(np.float32), w))


def test_experts_threads_and_numbers_that_are_none(both):
    rng = np.random.default_rng(3)
    inst = next(i for i in INSTANCES if i.table == "e2m1")
    w = samples.random_weight(rng, inst, [37, 12], 256, group=32, experts=3, kind="gaussian")
    x = rng.standard_normal((31, 256)).astype(np.float32)
    x[3, 5], x[4, 200], x[7] = np.nan, np.inf, 0
    expert = rng.integers(0, 3, (31, 2)).astype(np.int32)
    both.set_threads(3)
    assert same(bits(both, x, w, expert))
    both.set_threads(1)


def test_the_extremes_of_a_sum(both):
    """Largest bytes against largest bytes of either sign, all of a unit."""
    rng = np.random.default_rng(4)
    inst = next(i for i in INSTANCES if i.table == "linear" and i.bits == 8)
    w = samples.random_weight(rng, inst, 16, 256, group=128, kind="gaussian")
    for part in w.parts[0]:
        part.codes[:] = 255
    x = np.full((16, 256), 8355711, np.float32) * np.where(np.arange(16) % 2, -1, 1)[:, None]
    found = bits(both, x.astype(np.float32), w)
    assert same(found)
    for part in w.parts[0]:
        part.codes[:] = 254
    assert not found or bits(both, x.astype(np.float32), w) != found
