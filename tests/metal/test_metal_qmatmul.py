"""A weight times a prompt on Metal, in the simulator: tiles of simdgroup matrices."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_cases import check, to_numpy
from product_cases import INSTANCE, TABLES
from simt import metal

from hadamoe import Instance, Weight, ops, reference
from hadamoe.verify import bounds, cases, samples

pytestmark = pytest.mark.skipif(metal.missing() is not None, reason=str(metal.missing()))


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def operands(
    rng: np.random.Generator, inst: Instance, tokens: int, kind: str = "gaussian", **options
) -> tuple[np.ndarray, Weight]:
    columns = cases.columns_of(inst)[-1]
    w = samples.random_weight(rng, inst, [34, 5], columns, kind=kind, **options)
    if kind == "integer":
        return rng.integers(-4, 5, (tokens, columns)).astype("f4"), w
    return rng.standard_normal((tokens, columns)).astype("f4"), w


def case(x: np.ndarray, w: Weight, kind: str, expert: np.ndarray | None = None):
    return cases.qmatmul_case(w.parts[0][0].instance, kind, f"t={len(x)}", x, w, expert)


@pytest.mark.parametrize("inst", ops.instances(), ids=str)
def test_exact(inst, rng):
    with metal.installed(check=True) as log:
        check(case(*operands(rng, inst, 9, "integer"), "integer"))
    assert "qmatmul" in log[0].name
    assert np.prod(log[0].threadgroup) <= 256
    assert log[0].threadgroup_bytes <= 16384


@pytest.mark.parametrize("tokens", [32, 33, 65])
@pytest.mark.parametrize("inst", TABLES, ids=str)
def test_bound(inst, tokens, rng):
    with metal.installed() as log:
        check(case(*operands(rng, inst, tokens), "gaussian"))
    assert log[0].threadgroup_bytes <= 16384


def test_the_bound_finds_a_swapped_tile(rng):
    x, w = operands(rng, INSTANCE, 40)
    with metal.installed():
        got = to_numpy(ops.qmatmul(mx.array(np.roll(x, 8, 0)), w))
    want = reference.qmatmul(x, w)
    assert (np.abs(got - want) > bounds.qmatmul_bound(x, w, want, "f32")).any()


@pytest.mark.parametrize("variant", list(metal.variants()), ids=str)
def test_variants(variant, rng):
    for inst in TABLES[::2]:
        with metal.installed(**variant):
            check(case(*operands(rng, inst, 17), "gaussian"))


@pytest.mark.parametrize("inst", TABLES, ids=str)
def test_experts_that_meet_in_a_tile(inst, rng):
    """Any order of experts, some of them in one tile, one in several, one nowhere."""
    x, w = operands(rng, inst, 37, "integer", experts=4)
    expert = rng.choice([0, 1, 3], (37, 2), p=[0.1, 0.3, 0.6]).astype(np.int32)
    with metal.installed(check=True) as log:
        check(case(x, w, "integer", expert))
    assert [("qmatmul" in launch.name) for launch in log] == [True]


def test_experts_of_different_kinds(rng):
    kinds = [Instance("codebook", 2, "f16"), Instance("codebook", 4, "f16")]
    w = samples.random_weight(rng, kinds, [20, 40], 128, experts=3)
    x = rng.integers(-4, 5, (16, 128)).astype("f4")
    expert = rng.integers(0, 3, (16, 2)).astype(np.int32)
    with metal.installed(check=True):
        check(cases.qmatmul_case(None, "integer", "mixed", x, w, expert))


def test_the_least_e8m0_scale(rng):
    x, w = operands(rng, Instance("e2m1", 4, "e8m0"), 9, "integer")
    part = w.parts[0][0]
    part.scale[...] = 0
    x = x * np.float32(2.0**30)
    with metal.installed(ftz=True):
        got = to_numpy(ops.qmatmul(mx.array(x), w))
    np.testing.assert_array_equal(got, reference.qmatmul(x, w))


def test_one_kernel_for_prompts_of_any_length(rng):
    with metal.installed() as log:
        for tokens in (34, 70, 97):
            x, w = operands(rng, INSTANCE, tokens)
            ops.qmatmul(mx.array(x), w)
    assert len({launch.source for launch in log}) == 1
