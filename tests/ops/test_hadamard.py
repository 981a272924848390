"""hadamard: the same bits as the reference and as the tools that write rotated checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
from support import at_page_end

from hadamoe import _cpu, ops, reference
from hadamoe.errors import ContractError

POWERS = [1 << i for i in range(15)]


def run(x, block=0, pre=None, post=None, dtype=None) -> np.ndarray:
    """The native op on NaN-filled memory, every input ending at an unmapped page."""
    columns = ops.rotated_columns(x.shape[1], block or None)
    y = np.full((len(x), columns), np.nan, dtype or x.dtype)
    inputs = [a if a is None else at_page_end(a) for a in (x, pre, post)]
    _cpu.call("hadamard", inputs, [y], [block], [])
    return y


def signs(rng, n):
    return rng.choice(np.float32([-1, 1]), n)


@pytest.mark.parametrize("n", POWERS)
def test_every_power_of_two_same_bits_as_the_reference(isa, rng, n):
    for rows in (1, 3):
        x = rng.standard_normal((rows, n)).astype(np.float32)
        pre, post = signs(rng, n), rng.standard_normal(n).astype(np.float32)
        for block in (0, n):
            want = reference.hadamard(x, block=block, pre=pre, post=post)
            assert np.array_equal(run(x, block, pre, post), want)


@pytest.mark.parametrize("k", [3, 7, 43, 300, 768, 2047, 4304, 32767])
def test_padding_and_powers_of_two_of_any_width(isa, rng, k):
    x = rng.standard_normal((2, k)).astype(np.float32)
    pre = signs(rng, k)
    assert np.array_equal(run(x, 0, pre), reference.hadamard(x, pre=pre))
    for block in (1, 2, 8, 128, 1024):
        period = signs(rng, block), signs(rng, ops.rotated_columns(k, block))
        want = reference.hadamard(x, block=block, pre=period[0], post=period[1])
        assert np.array_equal(run(x, block, *period), want)


@pytest.mark.parametrize("period", [1, 3, 6, 64, 96, 192])
def test_signs_repeat_at_any_divisor_of_the_width(isa, rng, period):
    x = rng.standard_normal((2, 192)).astype(np.float32)
    sign = signs(rng, period)
    for block in (0, 64):
        want = reference.hadamard(x, block=block, pre=sign, post=sign)
        assert np.array_equal(run(x, block, sign, sign), want)


@pytest.mark.parametrize("n", [1, 4, 16, 256, 4096])
def test_exact_against_the_matrix_on_integers(isa, rng, n):
    """H[i, j] = (-1)^popcount(i & j) / sqrt(n); sqrt(n) a power of two makes every step exact."""
    i = np.arange(n)
    matrix = 1.0 - 2 * (np.bitwise_count(i[:, None] & i) & 1)
    x = rng.integers(-8, 9, (3, n)).astype(np.float32)
    want = x.astype(np.float64) @ matrix / np.sqrt(n)
    for block in (0, n):
        assert np.array_equal(run(x, block), want)


def f32_error_bound(x, n):
    """|error| <= d u / (1 - d u) * sum |x| / sqrt(n): log2(n) additions, one rounding of the root,
    one of the scaling (Higham, Accuracy and Stability, lemma 3.1)."""
    d, u = np.log2(n) + 2, 2.0**-24
    return d * u / (1 - d * u) * np.abs(x).sum(-1, keepdims=True) / np.sqrt(n)


def exact(x):
    """H x in f64 by the recursive definition [[H, H], [H, -H]] / sqrt(2)."""
    if x.shape[-1] == 1:
        return x
    a, b = (exact(half) for half in np.split(x, 2, axis=-1))
    return np.concatenate([a + b, a - b], -1) / np.sqrt(2)


@pytest.mark.parametrize("n", [2, 128, 512, 2048, 16384])
def test_within_the_rounding_bound_and_a_lost_sign_is_not(isa, rng, n):
    x = rng.standard_normal((4, n)).astype(np.float32)
    want, bound = exact(x.astype(np.float64)), f32_error_bound(x, n)
    for block in (0, n):
        y = run(x, block)
        assert (np.abs(y - want) <= bound).all()
        x_wrong = x.copy()
        x_wrong[:, -1] *= -1
        assert not (np.abs(run(x_wrong, block) - want) <= bound).all()


def test_inverse_gives_the_input_back(isa, rng):
    x = rng.standard_normal((2, 768)).astype(np.float32)
    pre, post = signs(rng, 128), signs(rng, 128)
    for block in (None, 128):
        y = ops.hadamard(x, block=block, pre=pre, post=post)
        back = ops.hadamard(y, block=block, pre=pre, post=post, inverse=True)
        # two transforms, each within its bound; the second carries the first one's error on
        bound = f32_error_bound(y, 512) + np.sqrt(512) * f32_error_bound(x, 512)
        assert (np.abs(back - x) <= bound).all()


@pytest.mark.parametrize("dtype", [np.float16, "bf16"])
def test_16_bit_storage_rounds_the_f32_result_once(isa, rng, dtype):
    x = rng.standard_normal((3, 700)).astype(np.float32)
    pre = signs(rng, 128)
    if dtype == np.float16:
        x = x.astype(dtype)
        want = reference.hadamard(x, block=128, pre=pre)
        assert np.array_equal(run(x, 128, pre), want.astype(dtype))
        assert np.array_equal(run(x, 128, pre, dtype=np.float32), want)
        return
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(x).bfloat16()
    want = torch.from_numpy(reference.hadamard(x.float().numpy(), block=128, pre=pre))
    for out in (torch.bfloat16, torch.float32):
        y = torch.full((3, 768), torch.nan, dtype=out)
        _cpu.call("hadamard", [x, pre, None], [y], [128], [])
        assert torch.equal(y, want.to(out))


def test_in_place(isa, rng):
    x = rng.standard_normal((5, 300)).astype(np.float32)
    want = reference.hadamard(x)
    _cpu.call("hadamard", [x, None, None], [x], [0], [])
    assert np.array_equal(x, want)


def test_same_bits_for_any_number_of_threads(isa, rng):
    x = rng.standard_normal((200, 768)).astype(np.float32)
    before = ops.threads()
    for block in (0, 128):
        first = run(x, block)
        for count in (1, 2, 5):
            ops.set_threads(count)
            assert np.array_equal(run(x, block), first)
    ops.set_threads(before)


def test_same_bits_as_turboquant(isa, golden):
    z = golden("hadamard")
    y = run(z["tqvllm.x"], 128, z["tqvllm.signs1"], z["tqvllm.signs2"])
    assert np.array_equal(y, z["tqvllm.x_rot"])


@pytest.mark.parametrize("name", ["jangtq", "jangtq2048"])
def test_same_bits_as_jangtq(isa, golden, name):
    z = golden("hadamard")
    y = run(z[f"{name}.x"], 0, z[f"{name}.signs"])
    assert np.array_equal(y, z[f"{name}.x_rot"])


@pytest.mark.parametrize("n", [64, 512, 2048])
def test_same_bits_as_mlx(isa, rng, n):
    mx = pytest.importorskip("mlx.core")
    x = rng.standard_normal((3, n)).astype(np.float32)
    want = mx.hadamard_transform(mx.array(x), stream=mx.cpu)
    assert np.array_equal(run(x), np.array(want))


def test_nothing_to_do():
    assert run(np.empty((0, 64), np.float32)).shape == (0, 64)


F = np.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros(8, F)}, "x has 1 dimensions, needs 2"),
        ({"x": np.zeros((2, 8))}, "x is f64, needs f32 bf16 f16 [k=8 r=2]"),
        ({"x": np.zeros((2, 16), F)[:, ::2]}, "x is not contiguous, needs row-major [k=8 r=2]"),
        ({"block": 3}, "block is 3, needs 0 or a power of two up to 16384 [k=8 r=2]"),
        ({"block": -8}, "block is -8, needs 0 or a power of two up to 16384 [k=8 r=2]"),
        ({"block": 32768}, "block is 32768, needs 0 or a power of two up to 16384 [k=8 r=2]"),
        (
            {"x": np.zeros((1, 32768), F)},
            "x has k=32768, needs at most 32767 where block is 0 [k=32768 r=1]",
        ),
        ({"block": 16}, "y has m=8, needs 16 [k=8 m=16 r=2]"),
        ({"y": np.full((3, 8), np.nan, F)}, "y has r=3, needs 2 [k=8 m=8 r=2]"),
        ({"y": np.full((2, 8), np.nan, np.float16)}, "y is f16, needs f32 [k=8 m=8 r=2]"),
        ({"pre": np.ones(3, F)}, "pre has p=3, needs a divisor of 8 [k=8 m=8 p=3 r=2]"),
        ({"pre": np.ones(0, F)}, "pre has p=0, needs a divisor of 8 [k=8 m=8 p=0 r=2]"),
        ({"pre": np.ones(8)}, "pre is f64, needs f32 [k=8 m=8 p=8 r=2]"),
        ({"pre": np.ones((1, 8), F)}, "pre has 2 dimensions, needs 1 [k=8 m=8 r=2]"),
        ({"post": np.ones(16, F)}, "post has q=16, needs a divisor of 8 [k=8 m=8 q=16 r=2]"),
        ({"post": np.ones(4, np.int8)}, "post is i8, needs f32 [k=8 m=8 q=4 r=2]"),
    ],
)
def test_rejects(changes, message):
    x = changes.get("x", np.zeros((2, 8), F))
    y = changes.get("y", np.full((2, 8), np.nan, F))
    signs = [changes.get("pre"), changes.get("post")]
    with pytest.raises(ContractError) as error:
        _cpu.call("hadamard", [x, *signs], [y], [changes.get("block", 0)], [])
    assert str(error.value) == f"hadamard: {message}"
    assert np.isnan(y).all()
