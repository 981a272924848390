"""MLX arrays give the numbers numpy arrays give, in bf16 too, which numpy lacks."""

from __future__ import annotations

import numpy as np
import pytest

from hadamoe import Instance, Rotation, ops
from hadamoe.errors import ContractError, UnsupportedError
from hadamoe.verify import layers, samples

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")

INST = Instance("linear", 4, "f32")


def numbers(a) -> np.ndarray:
    return np.array(a.astype(mx.float32))


def bf16(a: np.ndarray) -> np.ndarray:
    """f32 rounded to bf16, as f32."""
    return samples.from_bf16(samples.to_bf16(a))


@pytest.fixture
def weight(rng):
    return samples.random_weight(rng, INST, 24, 256, experts=3, kind="gaussian")


@pytest.fixture
def x(rng):
    return rng.standard_normal((2, 3, 256)).astype("f4")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_hadamard(x, dtype, rng):
    pre = rng.choice(np.float32([-1, 1]), 128)
    xm = mx.array(x).astype(getattr(mx, dtype))
    y = ops.hadamard(xm, block=128, pre=mx.array(pre))
    want = ops.hadamard(numbers(xm), block=128, pre=pre)
    assert (y.shape, y.dtype) == (x.shape, xm.dtype)
    np.testing.assert_array_equal(numbers(y), numbers(mx.array(want).astype(xm.dtype)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_qmatmul(x, weight, dtype, rng):
    expert = rng.integers(0, 3, (2, 3, 2))
    xm = mx.array(x).astype(getattr(mx, dtype))
    y = ops.qmatmul(xm, ops.pack(weight), expert=mx.array(expert))
    want = ops.qmatmul(numbers(xm), weight, expert=expert)
    assert (y.shape, y.dtype) == (want.shape, xm.dtype)
    np.testing.assert_array_equal(numbers(y), numbers(mx.array(want).astype(xm.dtype)))


def test_inputs_that_are_views_or_not_yet_computed(x, weight):
    one = samples.slice_rows(weight.parts[0][0], 0, 24)
    w = ops.pack(type(weight)(256, ((one,),)))
    turned = mx.array(np.ascontiguousarray(x.transpose(2, 1, 0))).transpose(2, 1, 0)
    np.testing.assert_array_equal(numbers(ops.qmatmul(turned, w)), ops.qmatmul(x, w))
    np.testing.assert_array_equal(numbers(ops.qmatmul(mx.array(x) * 2, w)), ops.qmatmul(x * 2, w))
    np.testing.assert_array_equal(
        numbers(ops.qmatmul(mx.array(x)[:, 1:], w)), ops.qmatmul(x[:, 1:], w)
    )


@pytest.mark.parametrize("dtype", [np.float32, mx.float16, mx.bfloat16])
def test_dequantize(weight, dtype):
    rows = np.array([[5, 71], [0, 30]])
    y = ops.dequantize(weight, mx.array(rows), dtype=dtype)
    want = mx.array(ops.dequantize(weight, rows)).astype(y.dtype)
    assert y.shape == (2, 2, 256)
    np.testing.assert_array_equal(numbers(y), numbers(want))


def test_dequantize_undoes_a_rotation_and_its_padding(rng):
    w = samples.random_weight(rng, Instance("codebook", 4, "f32"), 8, 384, kind="gaussian")
    signs = Rotation(128, *(rng.choice(np.float32([-1, 1]), 128) for _ in range(2)))
    w = type(w)(384, w.parts, signs, 300)
    y = ops.dequantize(w, mx.array(np.arange(8)))
    assert y.shape == (8, 300)
    np.testing.assert_array_equal(numbers(y), ops.dequantize(w))


def test_moe_decode(rng):
    hidden, inner, experts = 128, 64, 4
    sizes = {
        "router": (experts, hidden, 1), "gate_up": (2 * inner, hidden, experts),
        "down": (hidden, inner, experts), "shared_gate_up": (2 * inner, hidden, 1),
        "shared_down": (hidden, inner, 1), "shared_gate": (1, hidden, 1),
    }  # fmt: skip
    weights = {
        name: samples.random_weight(rng, INST, n, k, experts=e, kind="gaussian")
        for name, (n, k, e) in sizes.items()
    }
    moe = ops.MoeWeights.of(**weights)
    x = rng.standard_normal((5, hidden)).astype("f4")
    y = ops.moe_decode(mx.array(x), moe, top_k=2)
    np.testing.assert_array_equal(numbers(y), ops.moe_decode(x, moe, top_k=2))


def test_gated_delta_updates_states_in_place(rng):
    hk, hv, dk, dv, kernel, b, t = 2, 4, 16, 16, 4, 2, 3
    c = 2 * hk * dk + hv * dv
    shapes = [(b, t, c + hv * dv + 2 * hv), (c, kernel), (hv,), (hv,), (dv,), (b, c, kernel)]
    arrays = [rng.standard_normal(s).astype("f4") for s in [*shapes, (b, hv, dk, dv)]]
    theirs = [mx.array(a) for a in arrays]
    y = ops.gated_delta(*theirs, heads=(hk, hv), head_dims=(dk, dv))
    want = ops.gated_delta(*arrays, heads=(hk, hv), head_dims=(dk, dv))
    np.testing.assert_array_equal(numbers(y), want)
    for ours, mine in zip(theirs[-2:], arrays[-2:], strict=True):
        np.testing.assert_array_equal(numbers(ours), mine)


@pytest.mark.parametrize("op", layers.BLOCKS)
def test_blocks_give_the_same_bits(op):
    call = layers.BLOCKS[op](np.random.default_rng(3), "rows")
    for a, b in zip(call(True, mx.array), call(True), strict=True):
        np.testing.assert_array_equal(numbers(a), b)


def test_attention_writes_its_caches_in_place(rng):
    arrays = layers.attention_arrays(rng, 2, 3, 4, 2, 16, 8, 2, 6)
    theirs = [mx.array(a) for a in arrays.values()]
    mask = layers.padding(rng, 2, 3, 2, 6)
    y = ops.attention(*theirs, heads=4, past=2, mask=mx.array(mask))
    want = ops.attention(*arrays.values(), heads=4, past=2, mask=mask)
    np.testing.assert_array_equal(numbers(y), want)
    for ours, mine in zip(theirs[5:], (arrays["keys"], arrays["values"]), strict=True):
        np.testing.assert_array_equal(numbers(ours), mine)


def test_qmatmul_top(rng):
    w = samples.random_weight(rng, INST, 24, 256, kind="gaussian")
    x = rng.standard_normal((2, 3, 256)).astype("f4")
    for a, b in zip(ops.qmatmul_top(mx.array(x), w, 4), ops.qmatmul_top(x, w, 4), strict=True):
        assert a.shape == (2, 3, 4)
        np.testing.assert_array_equal(np.array(a), b)


@pytest.mark.parametrize("transform", [mx.compile, mx.vmap], ids=["compile", "vmap"])
def test_refuses_to_run_inside_a_transformation(transform, x):
    with pytest.raises(UnsupportedError) as e:
        mx.eval(transform(lambda a: ops.hadamard(a))(mx.array(x)))
    assert str(e.value) == (
        "hadamard: MLX arrays are computed eagerly on the CPU, not inside mx.compile or mx.vmap"
    )


def test_reports_bad_arguments_as_numpy_does(x, weight):
    for a in (x[..., :100], x.astype(np.int32)):
        with pytest.raises(ContractError) as ours:
            ops.qmatmul(mx.array(a), weight, expert=mx.zeros((2, 3, 1), mx.int32))
        with pytest.raises(ContractError) as numpys:
            ops.qmatmul(a, weight, expert=np.zeros((2, 3, 1), np.int32))
        assert str(ours.value) == str(numpys.value)
    with pytest.raises(ContractError, match="dtype is int32, needs float32, float16 or bfloat16"):
        ops.dequantize(weight, mx.array([0]), dtype=mx.int32)
    with pytest.raises(ContractError, match=r"expert has shape \(2, 1\), x has \(2, 3, 256\)"):
        ops.qmatmul(mx.array(x), weight, expert=mx.zeros((2, 1), mx.int32))
