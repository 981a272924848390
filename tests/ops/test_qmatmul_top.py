"""qmatmul_top: the largest results of qmatmul, by index among equals."""

from __future__ import annotations

import numpy as np
import pytest
from support import at_page_end

from hadamoe import _cpu, ops, reference
from hadamoe.errors import ContractError
from hadamoe.verify import claims, layers
from hadamoe.verify.samples import plain_part
from hadamoe.weight import Weight


def test_exactly_the_largest(isa):
    for case in layers.qmatmul_top_cases():
        claims.check(case)
        claims.check_deterministic(case)


def test_near_the_reference(isa, rng):
    turn, _ = layers.rotations(rng, "rows", 96, 96)
    w = layers.block_weight(rng, 500, 96, turn)
    x = rng.standard_normal((3, 96)).astype(np.float32)
    norm = rng.uniform(0.5, 1.5, 96).astype(np.float32)
    values, index = ops.qmatmul_top(x, w, 5, norm=norm)
    want, which = reference.qmatmul_top(x, w, 5, norm=norm)
    assert np.array_equal(index, which)
    assert np.abs(values - want).max() < 3e-6 * np.abs(want).max()
    assert not np.allclose(values, reference.qmatmul_top(x, w, 5)[0], rtol=1e-3)  # no norm


def test_16_bit_x_widens_exactly(isa, rng):
    w = layers.block_weight(rng, 50, 64, None)
    x = rng.standard_normal((2, 64)).astype(np.float16)
    for a, b in zip(ops.qmatmul_top(x, w, 3), ops.qmatmul_top(x.astype("f4"), w, 3), strict=True):
        assert np.array_equal(a, b)


def test_more_tokens_than_one_batch_and_none(rng):
    w = layers.block_weight(rng, 50, 64, None)
    x = rng.standard_normal((19, 64)).astype(np.float32)
    values, index = ops.qmatmul_top(x, w, 3)
    for t in range(19):
        one = ops.qmatmul_top(x[t], w, 3)
        assert np.array_equal(one[0], values[t])
        assert np.array_equal(one[1], index[t])
    assert ops.qmatmul_top(x[:0], w, 3)[0].shape == (0, 3)


def test_nan_counts_as_the_least():
    rows = np.zeros((40, 4), np.float32)
    rows[:, 0] = np.arange(40)
    rows[[0, 3, 39], 0] = np.nan
    w = Weight(4, ((plain_part(rows),),))
    values, index = ops.qmatmul_top(np.ones((1, 4), np.float32), w, 39)
    assert index[0, :37].tolist() == [i for i in range(38, -1, -1) if i not in (0, 3)]
    assert index[0, 37:].tolist() == [0, 3]
    assert np.isneginf(values[0, 37:]).all()


F = np.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((2, 63), F)}, "norm has k=64, needs 63 [k=63 t=2]"),
        ({"x": np.zeros((2, 64))}, "x is f64, needs f32 bf16 f16 [k=64 t=2]"),
        ({"norm": np.zeros(64)}, "norm is f64, needs f32 [k=64 t=2]"),
        ({"block": -2}, "block is -2, needs -1 or more [k=64 t=2]"),
        ({"block": 3}, "block is 3, needs 0 or a power of two up to 16384 [k=64 t=2]"),
        ({"eps": 1.0}, "eps is 1.000000, needs 0 <= eps < 1 [k=64 t=2]"),
        ({"block": 0, "pre": np.zeros(3, F)},
         "pre has p=3, needs a divisor of 64 [k=64 p=3 t=2]"),
        ({"value": np.zeros((2, 0), F), "index": np.zeros((2, 0), np.int32)},
         "value has a=0, needs 1..30 [a=0 k=64 t=2]"),
        ({"value": np.zeros((2, 31), F), "index": np.zeros((2, 31), np.int32)},
         "value has a=31, needs 1..30 [a=31 k=64 t=2]"),
        ({"value": np.zeros((1, 4), F)}, "value has t=1, needs 2 [k=64 t=2]"),
        ({"value": np.zeros((2, 4))}, "value is f64, needs f32 [a=4 k=64 t=2]"),
        ({"index": np.zeros((2, 3), np.int32)}, "index has a=3, needs 4 [a=4 k=64 t=2]"),
        ({"index": np.zeros((2, 4), np.int64)}, "index is i64, needs i32 [a=4 k=64 t=2]"),
    ],
)  # fmt: skip
def test_rejects(rng, changes, message):
    w = ops.pack(layers.block_weight(rng, 30, 64, None))
    arrays = {"x": np.zeros((2, 64), F), "norm": np.ones(64, F), "pre": None, "post": None}
    arrays = {k: changes.get(k, a) for k, a in arrays.items()}
    inputs = [None if a is None else at_page_end(a) for a in arrays.values()]
    outputs = [
        changes.get("value", np.zeros((2, 4), F)),
        changes.get("index", np.zeros((2, 4), np.int32)),
    ]
    for out in outputs:
        out.fill(77)
    ints, floats = [changes.get("block", -1)], [changes.get("eps", 1e-6)]
    with pytest.raises(ContractError) as error:
        _cpu.call("qmatmul_top", [*inputs, w.parts, *w.buffers], outputs, ints, floats)
    assert str(error.value) == f"qmatmul_top: {message}"
    assert all((out == 77).all() for out in outputs)
