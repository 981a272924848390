"""The Gated DeltaNet's CUDA kernels in the simulator: f32's bound, however tokens come in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_cases import FRONT, to_numpy, to_torch
from simt import cuda

from hadamoe import UnsupportedError, cuda_delta, gpu_calls, reference
from hadamoe.verify import layers, rounding
from hadamoe.verify.cases import DELTAS

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))

MODEL = (1, 1, 16, 32, 128, 128, 4)
SMALL = (2, 4, 2, 4, 16, 24, 4)
#: Every instance, for one token and for more, and dimensions that are no multiple of anything.
SHAPES = [*DELTAS, MODEL, *((b, 1, *rest) for b, _, *rest in DELTAS), (1, 37, 1, 1, 8, 40, 2)]
VARIANTS = [
    {"ftz": False},
    {"contract": False},
    {"schedule": "descending"},
    {"schedule": "random", "seed": 7},
]


def lent(arrays, dtype=torch.float32) -> dict[str, torch.Tensor]:
    named = {name: to_torch(a.copy()) for name, a in arrays.items()}
    return named | {"proj": named["proj"].to(dtype)}


def run(arrays: dict[str, torch.Tensor], shape, **options) -> tuple[np.ndarray, ...]:
    heads, dims = shape[2:4], shape[4:6]
    return to_numpy(
        gpu_calls.gated_delta(
            FRONT, *arrays.values(), heads=heads, head_dims=dims, eps=1e-6, **options
        )
    )


def check(shape, rng, **options) -> None:
    arrays = layers.gated_delta_arrays(rng, *shape)
    y, state = rounding.gated_delta(**arrays, hk=shape[2], eps=1e-6)
    _, conv_state, _ = reference.gated_delta(**arrays, hk=shape[2], eps=1e-6)
    with cuda.installed(**options):
        got = run(lent(arrays), shape)
    assert (np.abs(got[0] - y.value) <= y.error).all()
    np.testing.assert_array_equal(got[1], conv_state)
    assert (np.abs(got[2] - state.value) <= state.error).all()


def steps(arrays, shape, cuts, **options) -> list[np.ndarray]:
    """y and states of a prompt cut at these tokens."""
    arrays, ys = dict(arrays), []
    proj = arrays["proj"]
    for first, stop in zip([0, *cuts], [*cuts, proj.shape[1]], strict=True):
        arrays["proj"] = proj[:, first:stop].contiguous()
        y, conv_state, state = run(arrays, shape, **options)
        arrays |= {"conv_state": to_torch(conv_state), "state": to_torch(state)}
        ys.append(y)
    return [np.concatenate(ys, 1), conv_state, state]


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bound(shape, rng):
    check(shape, rng, check=True)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_bound_under_variants(variant, rng):
    check(SMALL, rng, **variant)
    check((2, 1, *SMALL[2:]), rng, **variant)


@pytest.mark.parametrize("tokens", [1, 4])
def test_the_bound_finds_a_state_read_in_another_order(tokens, rng):
    shape = (2, tokens, *SMALL[2:])
    arrays = layers.gated_delta_arrays(rng, *shape)
    y, _ = rounding.gated_delta(**arrays, hk=2, eps=1e-6)
    swapped = arrays | {"state": arrays["state"][:, :, ::-1].copy()}
    with cuda.installed():
        got = run(lent(swapped), shape)
    assert (np.abs(got[0] - y.value) > y.error).any()


@pytest.mark.parametrize("shape", [MODEL, (1, 9, 1, 2, 128, 128, 4)], ids=str)
def test_state_is_read_once_and_written_once(shape, rng):
    arrays = lent(layers.gated_delta_arrays(rng, *shape))
    with cuda.installed(check=True) as log:
        run(arrays, shape)
    assert len(log) == (2 if shape[1] == 1 else 3)
    size = arrays["state"].nbytes
    assert log[1].traffic["state"].read == size
    assert log[1].traffic["new_state"].written == size
    blocks = -(-shape[5] // 32) if shape[1] > 1 else 1
    tokens = log[1].traffic["qkv"]  # two value heads share q and k
    assert tokens.unique_read <= tokens.read <= 2 * blocks * tokens.unique_read


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dims", [SMALL[2:], (1, 3, 5, 150, 3)], ids=str)
def test_states_in_place_and_after_no_token(dims, tokens, rng):
    shape = (2, tokens, *dims)
    arrays = layers.gated_delta_arrays(rng, *shape)
    lengths = torch.tensor([tokens, tokens - 1], dtype=torch.int32)
    with cuda.installed(check=True):
        want = run(lent(arrays), shape, lengths=lengths)
        own = lent(arrays)
        got = run(own, shape, lengths=lengths, in_place=True)
        none = run(own | {"proj": own["proj"][:, :0]}, shape)
    for a, b in zip((*got, *none[1:]), (*want, *want[1:]), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(to_numpy(own["conv_state"]), want[1])
    np.testing.assert_array_equal(to_numpy(own["state"]), want[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 4])
def test_halves(tokens, dtype, rng):
    shape = (2, tokens, *SMALL[2:])
    arrays = lent(layers.gated_delta_arrays(rng, *shape), dtype)
    plain = {name: to_numpy(a.float()) for name, a in arrays.items()}
    want, _, state = reference.gated_delta(**plain, hk=shape[2], eps=1e-6)
    with cuda.installed():
        y, _, new_state = run(arrays, shape)
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    assert (np.abs(y - want) <= 1.01 * unit * np.abs(want) + 1e-6).all()
    np.testing.assert_allclose(new_state, state, atol=1e-5)


@pytest.mark.parametrize(
    "shape",
    [(2, 35, 1, 2, 128, 72, 4), (1, 19, 2, 4, 16, 24, 4), (1, 18, 1, 3, 5, 33, 3),
     (1, 7, 1, 2, 140, 40, 8)],
    ids=str,
)  # fmt: skip
def test_a_prompt_has_the_same_bits_cut_anywhere(shape, rng):
    arrays = lent(layers.gated_delta_arrays(rng, *shape))
    tokens = shape[1]
    with cuda.installed():
        whole = run(arrays, shape)
        for cuts in ([1], [tokens - 1], [2, 3, tokens // 2], range(1, tokens)):
            for a, b in zip(steps(arrays, shape, cuts), whole, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("variant", VARIANTS[1:], ids=str)
def test_bits_under_variants(variant, rng):
    shape = (2, 4, 1, 2, 40, 72, 4)
    arrays = lent(layers.gated_delta_arrays(rng, *shape))
    with cuda.installed():
        whole = run(arrays, shape)
    with cuda.installed(**variant):
        for got in (run(arrays, shape), steps(arrays, shape, range(1, 4))):
            for a, b in zip(got, whole, strict=True):
                np.testing.assert_array_equal(a, b)


def test_a_sequence_has_the_same_bits_in_a_batch(rng):
    for tokens in (1, 3):
        shape = (3, tokens, *SMALL[2:])
        arrays = lent(layers.gated_delta_arrays(rng, *shape))
        alone = {n: a[1:2] if a.shape[0] == 3 else a for n, a in arrays.items()}
        with cuda.installed():
            every, one = run(arrays, shape), run(alone, shape)
        for a, b in zip(every, one, strict=True):
            np.testing.assert_array_equal(a[1:2], b)


def test_lengths_and_masks(rng):
    shape = SMALL
    arrays = lent(layers.gated_delta_arrays(rng, *shape))
    with cuda.installed(check=True):
        short = run(arrays, shape, lengths=torch.tensor([4, 2], dtype=torch.int32))
        want = run(arrays | {"proj": arrays["proj"][:, :2].contiguous()}, shape)
        whole = run(arrays, shape)
    for got, whole_part, cut_part in zip(short[1:], whole[1:], want[1:], strict=True):
        np.testing.assert_array_equal(got[0], whole_part[0])
        np.testing.assert_array_equal(got[1], cut_part[1])
    np.testing.assert_array_equal(short[0][1, :2], want[0][1])
    assert not short[0][1, 2:].any()


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_masked_token_is_one_of_zeros(tokens, rng):
    shape = (2, tokens, *SMALL[2:])
    arrays = lent(layers.gated_delta_arrays(rng, *shape))
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[0, 0] = False
    zeroed = arrays | {"proj": torch.where(mask[..., None], arrays["proj"], 0)}
    with cuda.installed(check=True):
        masked, zeros = run(arrays, shape, mask=mask), run(zeroed, shape)
    for got, one in zip(masked, zeros, strict=True):
        np.testing.assert_array_equal(got, one)


def test_what_there_is_no_kernel_for():
    options = {"eps": 1e-6}
    with pytest.raises(UnsupportedError, match="heads of 257 and 8, on CUDA 256 at most"):
        cuda_delta.gated_delta(1, 1, (1, 1), (257, 8), 4, "float32", **options)
    with pytest.raises(UnsupportedError, match="9 taps, on CUDA 8 at most"):
        cuda_delta.gated_delta(1, 1, (1, 1), (8, 8), 9, "float32", **options)
