"""MLX arrays give the numbers numpy arrays give, lazily and eagerly; in bf16 too, unlike numpy."""

from __future__ import annotations

import numpy as np
import pytest

from hadamoe import Instance, Rotation, ops
from hadamoe.errors import ContractError, UnsupportedError
from hadamoe.verify import layers, samples

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
from hadamoe import mlx, mlx_host  # noqa: E402

INST = Instance("linear", 4, "f32")


@pytest.fixture(params=["lazy", "eager"], autouse=True)
def route(request, monkeypatch):
    """Every test runs on both routes of a CPU."""
    if request.param == "eager":
        monkeypatch.setattr(mlx_host, "bridge", None)
    elif mlx_host.bridge is None:
        pytest.skip("_mlx was not built for the installed mlx (HM_MLX=1 pip install .)")
    assert mlx.route() == request.param
    return request.param


def numbers(a) -> np.ndarray:
    return np.array(a.astype(mx.float32))


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
@pytest.mark.parametrize("index", ["int32", "int64", "uint32"])
def test_qmatmul(x, weight, dtype, index, rng):
    expert = rng.integers(0, 3, (2, 3, 2))
    xm = mx.array(x).astype(getattr(mx, dtype))
    y = ops.qmatmul(xm, ops.pack(weight), expert=mx.array(expert).astype(getattr(mx, index)))
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
    np.testing.assert_array_equal(
        numbers(ops.qmatmul(mx.array(x)[0, 1], w)), ops.qmatmul(x[0, 1], w)
    )
    np.testing.assert_array_equal(
        numbers(ops.qmatmul(mx.broadcast_to(mx.array(x)[0, 1], (4, 256)), w)),
        ops.qmatmul(np.tile(x[0, 1], (4, 1)), w),
    )
    assert ops.qmatmul(mx.zeros((0, 256)), w).shape == (0, 24)


@pytest.mark.parametrize("dtype", [np.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("rows", [[[5, 71], [0, 30]], [3], []])
def test_dequantize(weight, dtype, rows):
    rows = np.array(rows, np.int64)
    y = ops.dequantize(weight, mx.array(rows), dtype=dtype)
    want = mx.array(ops.dequantize(weight, rows)).astype(y.dtype)
    assert y.shape == (*rows.shape, 256)
    np.testing.assert_array_equal(numbers(y), numbers(want))


def test_dequantize_undoes_a_rotation_and_its_padding(rng):
    w = samples.random_weight(rng, Instance("codebook", 4, "f32"), 8, 384, kind="gaussian")
    signs = Rotation(128, *(rng.choice(np.float32([-1, 1]), 128) for _ in range(2)))
    w = type(w)(384, w.parts, signs, 300)
    y = ops.dequantize(w, mx.array(np.arange(8)))
    assert y.shape == (8, 300)
    np.testing.assert_array_equal(numbers(y), ops.dequantize(w))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_moe_decode(rng, dtype):
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
    x = mx.array(rng.standard_normal((5, 1, hidden)).astype("f4")).astype(getattr(mx, dtype))
    y = ops.moe_decode(x, moe, top_k=2)
    want = mx.array(ops.moe_decode(numbers(x), moe, top_k=2)).astype(x.dtype)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    np.testing.assert_array_equal(numbers(y), numbers(want))


def delta(rng, b: int, t: int) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays and options of one gated_delta."""
    hk, hv, dk, dv = 2, 4, 16, 24
    arrays = layers.gated_delta_arrays(rng, b, t, hk, hv, dk, dv, 4)
    return arrays, {"heads": (hk, hv), "head_dims": (dk, dv)}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gated_delta_returns_new_states(rng, dtype):
    arrays, options = delta(rng, 2, 3)
    theirs = {name: mx.array(a) for name, a in arrays.items()}
    theirs["proj"] = theirs["proj"].astype(getattr(mx, dtype))
    y, *states = mlx.gated_delta(*theirs.values(), **options)
    for name, a in arrays.items():
        if name != "proj":
            np.testing.assert_array_equal(numbers(theirs[name]), a)
    arrays["proj"] = numbers(theirs["proj"])
    want = mx.array(ops.gated_delta(*arrays.values(), **options)).astype(y.dtype)
    assert y.dtype == theirs["proj"].dtype
    np.testing.assert_array_equal(numbers(y), numbers(want))
    for ours, name in zip(states, ("conv_state", "state"), strict=True):
        np.testing.assert_array_equal(numbers(ours), arrays[name])


COUNTS = (5, 2, 0)  # tokens of each sequence of a prompt padded to 5


@pytest.mark.parametrize("given", ["lengths", "mask", "both"])
def test_padding_behind_a_prompt_leaves_the_states_alone(rng, given):
    arrays, options = delta(rng, 3, 5)
    mask = np.arange(5) < np.array(COUNTS)[:, None]
    padding = {"lengths": mx.array(COUNTS), "mask": mx.array(mask)}
    if given != "both":
        padding = {given: padding[given]}
    y, *states = mlx.gated_delta(*map(mx.array, arrays.values()), **options, **padding)
    for b, count in enumerate(COUNTS):
        alone = {n: a[b : b + 1].copy() if a.shape[0] == 3 else a for n, a in arrays.items()}
        alone["proj"] = np.ascontiguousarray(alone["proj"][:, :count])
        want = ops.gated_delta(*alone.values(), **options)
        np.testing.assert_array_equal(numbers(y[b, :count]), want[0])
        np.testing.assert_array_equal(numbers(y[b, count:]), 0)
        for ours, name in zip(states, ("conv_state", "state"), strict=True):
            np.testing.assert_array_equal(numbers(ours[b]), alone[name][0])


def test_padding_before_a_prompt(rng):
    """As mlx-lm pads a batch: the states are zeros, and stay zeros until a sequence begins."""
    arrays, options = delta(rng, 2, 5)
    arrays["conv_state"][:], arrays["state"][:] = 0, 0
    mask = np.arange(5) >= np.array([[0], [3]])
    theirs = list(map(mx.array, arrays.values()))
    y, *states = mlx.gated_delta(*theirs, **options, mask=mx.array(mask))
    alone = {n: a[1:].copy() if a.shape[0] == 2 else a for n, a in arrays.items()}
    alone["proj"] = np.ascontiguousarray(alone["proj"][:, 3:])
    np.testing.assert_array_equal(numbers(y[1, 3:]), ops.gated_delta(*alone.values(), **options)[0])
    for ours, name in zip(states, ("conv_state", "state"), strict=True):
        np.testing.assert_array_equal(numbers(ours[1]), alone[name][0])


@pytest.mark.parametrize("kind", ["none", "blocks", "rows"])
@pytest.mark.parametrize("op", layers.BLOCKS)
def test_blocks_give_the_same_bits(op, kind):
    call = layers.BLOCKS[op](np.random.default_rng(3), kind)
    for a, b in zip(call(True, mx.array, mlx), call(True), strict=True):
        np.testing.assert_array_equal(numbers(a), b)


def test_lengths_of_a_block_are_a_mask(rng, monkeypatch):
    call = layers.gated_delta_block_call(rng, "rows")
    lengths = mx.array([3, 1])
    block = mlx.gated_delta_block

    class Masked:
        @staticmethod
        def gated_delta_block(*args, mask, **options):
            return block(*args, mask=mx.arange(3) < lengths[:, None], **options)

    class Counted:
        @staticmethod
        def gated_delta_block(*args, mask, **options):
            return block(*args, lengths=lengths, **options)

    for a, b in zip(call(True, mx.array, Masked), call(True, mx.array, Counted), strict=True):
        np.testing.assert_array_equal(numbers(a), numbers(b))


def test_attention_returns_new_caches(rng):
    arrays = layers.attention_arrays(rng, 2, 3, 4, 2, 16, 8, 2, 6)
    theirs = [mx.array(a) for a in arrays.values()]
    mask = layers.padding(rng, 2, 3, 2, 6)
    y, *caches = mlx.attention(*theirs, heads=4, past=2, mask=mx.array(mask))
    for array, a in zip(theirs, arrays.values(), strict=True):
        np.testing.assert_array_equal(numbers(array), a)
    want = ops.attention(*arrays.values(), heads=4, past=2, mask=mask)
    np.testing.assert_array_equal(numbers(y), want)
    for ours, name in zip(caches, ("keys", "values"), strict=True):
        np.testing.assert_array_equal(numbers(ours), arrays[name])


def test_qmatmul_top(rng):
    w = samples.random_weight(rng, INST, 24, 256, kind="gaussian")
    x = rng.standard_normal((2, 3, 256)).astype("f4")
    for a, b in zip(ops.qmatmul_top(mx.array(x), w, 4), ops.qmatmul_top(x, w, 4), strict=True):
        assert a.shape == (2, 3, 4)
        np.testing.assert_array_equal(np.array(a), b)


@pytest.mark.parametrize("op", ["gated_delta", "gated_delta_block", "attention", "attention_block"])
def test_ops_that_write_their_states_take_no_mlx_arrays(op, rng):
    """MLX may share an array's memory with other arrays, which would change with it."""
    if op.endswith("block"):
        run = layers.BLOCKS[op](rng, "none")
        call = lambda: run(True, mx.array)  # noqa: E731
    elif op == "attention":
        arrays = layers.attention_arrays(rng, 2, 3, 4, 2, 16, 8, 2, 6)
        call = lambda: ops.attention(*map(mx.array, arrays.values()), heads=4)  # noqa: E731
    else:
        arrays, options = delta(rng, 2, 3)
        call = lambda: ops.gated_delta(*map(mx.array, arrays.values()), **options)  # noqa: E731
    with pytest.raises(UnsupportedError) as e:
        call()
    assert str(e.value) == f"{op}: MLX arrays are not written in place; use hadamoe.mlx.{op}"


def test_no_derivative(x, weight):
    def f(a):
        return ops.qmatmul(a, weight, expert=mx.zeros((2, 3, 1), mx.int32)).sum()

    for derivative in (
        lambda: mx.grad(f)(mx.array(x)),
        lambda: mx.value_and_grad(f)(mx.array(x)),
        lambda: mx.jvp(f, [mx.array(x)], [mx.array(x)]),
    ):
        with pytest.raises(UnsupportedError) as e:
            mx.eval(derivative())
        assert str(e.value) == "qmatmul: has no derivative"
    scale = mx.array(2.0)  # what the op does not depend on has one
    assert mx.grad(lambda s: s * mx.stop_gradient(f(mx.array(x))))(scale) == f(mx.array(x))


def test_refuses_at_once_as_numpy_does(x, weight):
    for a in (x[..., :100], x.astype(np.int32), x.astype(np.complex64)):
        with pytest.raises(ContractError) as ours:
            ops.qmatmul(mx.array(a), weight, expert=mx.zeros((2, 3, 1), mx.int32))
        with pytest.raises(ContractError) as numpys:
            ops.qmatmul(a, weight, expert=np.zeros((2, 3, 1), np.int32))
        assert str(ours.value) == str(numpys.value)
    with pytest.raises(ContractError, match="dtype is int32, needs float32, float16 or bfloat16"):
        ops.dequantize(weight, mx.array([0]), dtype=mx.int32)
    with pytest.raises(ContractError, match=r"expert has shape \(2, 1\), x has \(2, 3, 256\)"):
        ops.qmatmul(mx.array(x), weight, expert=mx.zeros((2, 1), mx.int32))
    with pytest.raises(ContractError, match="expert is float32, needs integers"):
        ops.qmatmul(mx.array(x), weight, expert=mx.zeros((2, 3, 1)))
    with pytest.raises(ContractError, match="pre has p=3, needs a divisor of 256"):
        ops.hadamard(mx.array(x), pre=mx.ones(3))
    with pytest.raises(ContractError, match="parts has 3 experts, needs 1 without expert"):
        ops.qmatmul(mx.array(x), weight)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("conv_state", lambda a: a[1:], "conv_state has b=1, needs 2"),
        ("state", lambda a: a.swapaxes(2, 3), "state has k=24, needs 16"),
        ("state", lambda a: a.astype(mx.float16), "state is f16, needs f32"),
        ("a_log", lambda a: a[1:], "a_log has h=3, needs 4"),
        ("proj", lambda a: a[0], "proj has 2 dimensions, needs 3"),
        ("state", np.array, "has a ndarray, needs an MLX array"),
        ("mask", lambda _: mx.ones((2, 4), mx.bool_), "mask has shape (2, 4), needs (2, 3)"),
        ("lengths", lambda _: mx.array([1]), "lengths has shape (1,), needs (2,)"),
        ("lengths", lambda _: mx.array([1.0, 2.0]), "lengths is float32, needs integers"),
    ],
)
def test_refuses_wrong_states_at_once(rng, name, change, message):
    arrays, options = delta(rng, 2, 3)
    theirs = {n: mx.array(a) for n, a in arrays.items()}
    if name in theirs:
        theirs[name] = change(theirs[name])
    else:
        options[name] = change(None)
    with pytest.raises(ContractError) as e:
        mlx.gated_delta(*theirs.values(), **options)
    assert str(e.value).startswith(f"gated_delta: {message}")


def test_wrong_numbers_are_refused_when_they_are_known(x, weight, route):
    rows = mx.array([0, 70, 99])
    with pytest.raises(ContractError, match=r"rows\[2\] is 99, needs 0..71"):
        mx.eval(ops.dequantize(weight, rows))
    if route == "lazy":
        y = ops.dequantize(weight, rows)  # says nothing yet
        with pytest.raises(ContractError, match=r"rows\[2\] is 99, needs 0..71"):
            mx.eval(y)
    with pytest.raises(ContractError, match=r"expert\[1,0\] is 3, needs 0..2"):
        mx.eval(ops.qmatmul(mx.array(x[0]), weight, expert=mx.array([[0], [3], [1]])))
    again = ops.dequantize(weight, mx.array([0]))  # the stream goes on
    np.testing.assert_array_equal(numbers(again), ops.dequantize(weight, [0]))


@pytest.mark.parametrize("transform", [mx.compile, mx.vmap], ids=["compile", "vmap"])
def test_eager_ops_refuse_transformations(transform, x, monkeypatch):
    monkeypatch.setattr(mlx_host, "bridge", None)
    with pytest.raises(UnsupportedError) as e:
        mx.eval(transform(lambda a: ops.hadamard(a))(mx.array(x)))
    assert str(e.value) == (
        "hadamard: MLX arrays are computed eagerly on the CPU, not inside mx.compile or mx.vmap"
    )
