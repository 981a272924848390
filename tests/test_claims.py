"""Claims that a broken kernel would pass prove nothing: each is shown a kernel that breaks it."""

from __future__ import annotations

import numpy as np
import pytest

from hadamoe import Instance, Weight, ops, reference
from hadamoe.verify import cases, claims, samples

INSTANCES = [
    Instance("linear", 4, "bf16"),
    Instance("codebook", 2, "f16"),
    Instance("plain", 16, "f16"),
]


class Mutant:
    """``_cpu`` whose qmatmul is numpy in f64, spoiled by a function of (x, W, expert) -> y."""

    def __init__(self, spoil=None, after=None):
        self.spoil, self.after, self.threads_set = spoil, after, 0

    def instances(self):
        return ops._cpu.instances()

    def set_threads(self, count):
        self.threads_set += 1

    def call(self, op, inputs, outputs, ints, floats):
        assert op == "qmatmul"
        x, _, expert = inputs[:3]
        w = samples.values(self.weight)
        x = x.astype(np.float64)
        if self.spoil:
            x, w = self.spoil(x, w)
        every = np.einsum("rk,enk->ren", x, w)
        y = every[:, 0] if expert is None else np.take_along_axis(every, expert[..., None], 1)
        before = outputs[0].copy()
        outputs[0][...] = y
        if self.after:
            self.after(outputs[0], before, self.threads_set)


def run(mutant: Mutant, inst: Instance, kind: str, check=claims.check) -> None:
    """Every case of the instance; ops.pack tells the mutant which weight it is about."""
    for case in cases.qmatmul_cases(inst, kind):
        pack = ops.pack

        def spy(*weights: Weight, pack=pack):
            mutant.weight = weights[0]
            return pack(*weights)

        ops.pack = spy
        try:
            check(case, mutant)
        finally:
            ops.pack = pack


def last_column(x, w):
    return x[:, :-1], w[..., :-1]


def neighbours_swapped(x, w):
    w = w.copy()
    w[..., [0, 1]] = w[..., [1, 0]]
    return x, w


def bf16_inputs(x, w):
    return samples.from_bf16(samples.to_bf16(x)).astype(np.float64), w


def f16_weights(x, w):
    return x, w.astype(np.float16).astype(np.float64)


def last_element(y, before, _):
    y.flat[-1] = before.flat[-1]


@pytest.mark.parametrize("inst", INSTANCES, ids=str)
@pytest.mark.parametrize("kind", ["integer", "gaussian"])
def test_a_right_kernel_passes(inst, kind):
    run(Mutant(), inst, kind)
    run(Mutant(), inst, kind, claims.check_deterministic)


@pytest.mark.parametrize("inst", INSTANCES, ids=str)
@pytest.mark.parametrize("kind", ["integer", "gaussian"])
@pytest.mark.parametrize(
    "mutant", [Mutant(last_column), Mutant(neighbours_swapped), Mutant(after=last_element)],
    ids=["last column", "columns swapped", "last element not written"],
)  # fmt: skip
def test_wrong_indexing_fails(inst, kind, mutant):
    with pytest.raises(claims.ClaimError, match="is wrong in"):
        run(mutant, inst, kind)


@pytest.mark.parametrize("spoil", [bf16_inputs, f16_weights])
def test_lost_precision_fails_the_bound(spoil):
    with pytest.raises(claims.ClaimError, match="within"):
        run(Mutant(spoil), INSTANCES[0], "gaussian")


def test_results_that_depend_on_threads_fail():
    def after(y, _, count):
        y += np.float32(count * 1e-7) * np.abs(y)

    with pytest.raises(claims.ClaimError, match="other bits"):
        run(Mutant(after=after), INSTANCES[0], "gaussian", claims.check_deterministic)


def test_wrong_shape_fails():
    case = next(cases.qmatmul_cases(INSTANCES[0], "integer"))
    with pytest.raises(claims.ClaimError, match="has shape"):
        claims.compare(case, (np.zeros((1, 1), np.float32),))


def test_magnitude_bounds_every_number():
    rng = np.random.default_rng(0)
    for inst in ops.instances():
        w = samples.random_weight(rng, inst, 4, 128, kind="gaussian")
        bound = np.abs(samples.values(samples.magnitude(w)))
        assert (bound >= np.abs(samples.values(w)) * (1 - 2**-20)).all(), inst


def test_storage_conversions_round_to_nearest_even():
    x = np.float32([1, 1 + 2**-8, 1 + 3 * 2**-8, -3.3895314e38, 1e-40])
    np.testing.assert_array_equal(
        samples.to_bf16(x), np.array([0x3F80, 0x3F80, 0x3F82, 0xFF7F, 0x0001], np.uint16)
    )
    np.testing.assert_array_equal(samples.from_bf16(samples.to_bf16(x))[:1], x[:1])
    codes = np.array([[1, 2, 3, 4]])
    assert samples.pack_bits(codes, 3).tolist() == [[0b11010001, 0b00001000]]


def test_slice_rows():
    part = samples.random_part(np.random.default_rng(1), ops.instances()[0], 3, 64, 32)
    np.testing.assert_array_equal(
        reference.part_values(samples.slice_rows(part, 1, 9), 64),
        reference.part_values(part, 64)[1:],
    )


@pytest.mark.parametrize("inst", ops.instances(), ids=str)
@pytest.mark.parametrize(
    ("position", "number"), [(0, 2), (1, 0)], ids=["an expert less", "not normalised"]
)
def test_a_mixture_put_together_wrongly_leaves_its_bound(inst, position, number):
    native = ops._cpu

    class Changed:
        def call(self, op, inputs, outputs, ints, floats):
            ints = [number if i == position else n for i, n in enumerate(ints)]
            native.call(op, inputs, outputs, ints, floats)

    case = cases.moe_decode_gaussian_case(inst)
    claims.check(case)
    with pytest.raises(claims.ClaimError, match="within"):
        claims.check(case, Changed())
