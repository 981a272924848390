"""Claims of a mixture of experts that every GPU's kernels make; a test module brings ``run_moe``.

``run_moe(x, moe, top_k)``: `reference.moe_decode`'s result by the kernels at hand.
"""

from __future__ import annotations

from dataclasses import replace

import moe_weights
import numpy as np
import pytest
from moe_weights import LAYERS

from hadamoe import ops, reference
from hadamoe.verify.samples import plain_part, random_weight
from hadamoe.weight import Weight, fuse_rows, stack_experts


def tokens(rng, count: int, hidden: int = 256) -> np.ndarray:
    return rng.standard_normal((count, hidden)).astype(np.float32)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("name", LAYERS)
def test_near_the_reference(name, rng, run_moe):
    """One token and as many as decode together; mutants: one expert less, another normalisation."""
    moe = moe_weights.moe(rng, name)
    for count, normalize in ((1, True), (8, False)):
        x = tokens(rng, count)
        y = run_moe(x, moe, 3, normalize=normalize)
        want = reference.moe_decode(x, moe, top_k=3, normalize=normalize)[0]
        assert distance(y, want) < 3e-6
        for top_k, other in ((2, normalize), (3, not normalize)):
            mutant = reference.moe_decode(x, moe, top_k=top_k, normalize=other)[0]
            assert distance(y, mutant) > 1e-4


@pytest.mark.parametrize("name", ["config-i", "tq-apex2", "jangtq2", "mxfp4"])
def test_a_token_depends_on_nothing_else(name, rng, run_moe):
    """The same bits alone, among others, again, and in whatever order threads run."""
    moe = moe_weights.moe(rng, name)
    x = tokens(rng, 5)
    want = run_moe(x, moe, 3)
    np.testing.assert_array_equal(run_moe(x[::-1].copy(), moe, 3)[::-1], want)
    for t in (0, 4):
        alone = run_moe(x[t : t + 1], moe, 3)
        np.testing.assert_array_equal(alone, want[t : t + 1])
    for schedule in ("descending", "random"):
        again = run_moe(x, moe, 3, schedule=schedule)
        np.testing.assert_array_equal(again, want)


def test_experts_of_many_kinds(rng, run_moe):
    """Every expert has other instances than the one before, gate and up too, and one has three
    parts, cut where no tile's rows are."""
    kinds = [i for i in ops.instances() if i.table != "plain" and i.scale != "f32"]
    hidden, inner = 128, 96

    def part(i: int, rows: int, columns: int) -> Weight:
        return random_weight(rng, kinds[i % len(kinds)], rows, columns, group=32, kind="gaussian")

    def expert(e: int) -> Weight:
        rows = (inner, inner) if e != 2 else (50, 7, 2 * inner - 57)
        return fuse_rows([part(5 * e + i, n, hidden) for i, n in enumerate(rows)])

    moe = moe_weights.moe(rng, "w4a16", hidden=hidden, inner=inner, experts=6)
    moe["gate_up"] = stack_experts([expert(e) for e in range(6)])
    moe["down"] = stack_experts([part(7 * e, hidden, inner) for e in range(6)])
    x = tokens(rng, 2, hidden)
    assert distance(run_moe(x, moe, 6), reference.moe_decode(x, moe, top_k=6)[0]) < 3e-6


@pytest.mark.parametrize("own", [64, 192])
@pytest.mark.parametrize("name", ["mxfp4", "jangtq2"])
def test_a_shared_expert_of_another_width(name, own, rng, run_moe):
    moe = moe_weights.moe(rng, name)
    other = moe_weights.moe(rng, name, inner=own)
    moe |= {role: other[role] for role in ("shared_gate_up", "shared_down")}
    x = tokens(rng, 2)
    assert distance(run_moe(x, moe, 3), reference.moe_decode(x, moe, top_k=3)[0]) < 3e-6


def test_an_inner_state_that_is_padded(rng, run_moe):
    """TQ's blocks of 128 over 96 columns, beside a shared expert that reads them as they are."""
    moe = moe_weights.moe(rng, "tq-apex2", inner=96)
    down = [moe_weights.matrix(rng, LAYERS["tq-apex2"].down, 256, 128) for _ in range(6)]
    moe["down"] = replace(stack_experts(down), rotation=moe["gate_up"].rotation)
    moe["shared_down"] = moe_weights.matrix(rng, LAYERS["w4a16"].down, 256, 96)
    x = tokens(rng, 2)
    assert distance(run_moe(x, moe, 3), reference.moe_decode(x, moe, top_k=3)[0]) < 3e-6


def routed_by(logits: np.ndarray, moe: dict[str, Weight]) -> dict[str, Weight]:
    """The weights with a router whose logits are these for an x that begins with 1."""
    w = np.zeros((len(logits), moe["router"].columns), np.float32)
    w[:, 0] = logits
    return moe | {"router": Weight(w.shape[1], ((plain_part(w),),))}


@pytest.mark.parametrize("experts", [5, 40, 256])
def test_equal_logits_take_the_lower_expert(experts, rng, run_moe):
    moe = moe_weights.moe(rng, "w4a16", hidden=64, inner=32, experts=experts, distinct=5)
    logits = rng.integers(0, 2, experts).astype(np.float32)
    x = tokens(rng, 1, 64)
    x[:, 0] = 1
    y = run_moe(x, routed_by(logits, moe), 4)
    want, chosen, _ = reference.moe_decode(x, routed_by(logits, moe), top_k=4)
    assert distance(y, want) < 3e-6
    another = logits.copy()
    another[chosen[0, 3]] -= 1e-3  # a later one instead
    assert distance(y, reference.moe_decode(x, routed_by(another, moe), top_k=4)[0]) > 1e-3


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_logits_that_are_no_numbers(bad, rng, run_moe):
    """A token routed by NaN is NaN, reads no memory it should not, and spoils no other."""
    moe = moe_weights.moe(rng, "config-i")
    x = tokens(rng, 3)
    want = run_moe(x, moe, 3)
    x[1, 5] = bad
    y = run_moe(x, moe, 3)
    assert np.isnan(y[1]).all()
    np.testing.assert_array_equal(y[[0, 2]], want[[0, 2]])


def test_a_token_of_a_prompt_that_is_no_number(rng, run_moe):
    moe, x = moe_weights.moe(rng, "config-i"), tokens(rng, 12)
    want = run_moe(x, moe, 3)
    x[4, 9] = np.nan
    y = run_moe(x, moe, 3, check=True)
    assert np.isnan(y[4]).all()
    np.testing.assert_array_equal(np.delete(y, 4, 0), np.delete(want, 4, 0))
