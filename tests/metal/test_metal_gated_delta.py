"""The Gated DeltaNet's Metal kernel in the simulator: f32's bound, however tokens come in."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from simt import metal

from hadamoe import mlx_gpu_delta, ops, reference
from hadamoe.verify import layers, rounding
from hadamoe.verify.cases import DELTAS

pytestmark = pytest.mark.skipif(metal.missing() is not None, reason=str(metal.missing()))

MODEL = (1, 1, 16, 32, 128, 128, 4)
VARIANTS = list(metal.variants())


def lent(arrays: dict[str, np.ndarray], dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    named = {name: mx.array(a) for name, a in arrays.items()}
    return named | {"proj": named["proj"].astype(dtype)}


def run(arrays: dict[str, mx.array], shape: tuple[int, ...], **options) -> list[np.ndarray]:
    _, _, hk, hv, dk, dv, _ = shape
    out = mlx_gpu_delta.gated_delta(
        *arrays.values(), heads=(hk, hv), head_dims=(dk, dv), eps=1e-6, **options
    )
    return [np.array(a.astype(mx.float32)) for a in out]


def check(shape: tuple[int, ...], rng: np.random.Generator, slack: float = 1.0, **options) -> None:
    arrays = layers.gated_delta_arrays(rng, *shape)
    y, state = rounding.gated_delta(**arrays, hk=shape[2], eps=1e-6)
    _, conv_state, _ = reference.gated_delta(**arrays, hk=shape[2], eps=1e-6)
    with metal.installed(**options):
        got = run(lent(arrays), shape)
    assert (np.abs(got[0] - y.value) <= slack * y.error).all()
    np.testing.assert_array_equal(got[1], conv_state)
    assert (np.abs(got[2] - state.value) <= slack * state.error).all()


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.mark.parametrize("shape", [*DELTAS, MODEL], ids=str)
def test_bound(shape, rng):
    check(shape, rng, check=True)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_bound_under_variants(variant, rng):
    check(DELTAS[1], rng, slack=4.0 if "ulp" in variant else 1.0, **variant)


def test_the_bound_finds_a_state_read_in_another_order(rng):
    arrays = layers.gated_delta_arrays(rng, *DELTAS[1])
    y, _ = rounding.gated_delta(**arrays, hk=2, eps=1e-6)
    swapped = arrays | {"state": arrays["state"][:, :, ::-1].copy()}
    with metal.installed():
        got = run(lent(swapped), DELTAS[1])
    assert (np.abs(got[0] - y.value) > y.error).any()


def test_state_is_read_once_and_written_once(rng):
    arrays = lent(layers.gated_delta_arrays(rng, *MODEL))
    with metal.installed(check=True) as log:
        run(arrays, MODEL)
    assert len(log) == 1
    size = arrays["state"].nbytes
    assert log[0].traffic["state"][0] == size
    assert log[0].traffic["new_state"][1] == size


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_halves(dtype, rng):
    shape = DELTAS[1]
    arrays = lent(layers.gated_delta_arrays(rng, *shape), dtype)
    plain = {name: np.array(a.astype(mx.float32)) for name, a in arrays.items()}
    want, _, state = reference.gated_delta(**plain, hk=shape[2], eps=1e-6)
    with metal.installed():
        got = run(arrays, shape)
    unit = 2.0**-8 if dtype == mx.bfloat16 else 2.0**-11
    assert (np.abs(got[0] - want) <= 1.01 * unit * np.abs(want) + 1e-6).all()
    np.testing.assert_allclose(got[2], state, atol=1e-5)


def test_a_prompt_has_the_bits_of_its_tokens(rng):
    shape = (2, 4, 2, 4, 16, 24, 4)
    arrays = lent(layers.gated_delta_arrays(rng, *shape))
    with metal.installed():
        whole = run(arrays, shape)
        steps = dict(arrays)
        ys = []
        for t in range(4):
            steps["proj"] = arrays["proj"][:, t : t + 1]
            y, conv_state, state = run(steps, shape)
            steps |= {"conv_state": mx.array(conv_state), "state": mx.array(state)}
            ys.append(y)
    np.testing.assert_array_equal(np.concatenate(ys, 1), whole[0])
    np.testing.assert_array_equal(conv_state, whole[1])
    np.testing.assert_array_equal(state, whole[2])


def test_lengths_and_masks(rng):
    shape = (2, 4, 2, 4, 16, 24, 4)
    arrays = lent(layers.gated_delta_arrays(rng, *shape))
    with metal.installed(check=True):
        short = run(arrays, shape, lengths=mx.array([4, 2], mx.int32))
        cut = dict(arrays, proj=arrays["proj"][:, :2])
        want = run(cut, shape)
        whole = run(arrays, shape)
        mask = np.array([[False, True, True, True], [True] * 4])
        masked = run(arrays, shape, mask=mx.array(mask))
        zeroed = dict(arrays, proj=mx.where(mx.array(mask)[..., None], arrays["proj"], 0))
        zeros = run(zeroed, shape)
    for got, whole_part, cut_part in zip(short[1:], whole[1:], want[1:], strict=True):
        np.testing.assert_array_equal(got[0], whole_part[0])
        np.testing.assert_array_equal(got[1], cut_part[1])
    np.testing.assert_array_equal(short[0][1, :2], want[0][1])
    assert not short[0][1, 2:].any()
    for got, one in zip(masked, zeros, strict=True):
        np.testing.assert_array_equal(got, one)


@pytest.mark.parametrize("kind", ["none", "blocks", "rows"])
def test_block_in_three_launches(kind, rng):
    shape, hidden = (2, 3, 2, 4, 16, 24, 4), 96
    _, _, hk, hv, dk, dv, _ = shape
    first, second = layers.rotations(rng, kind, hidden, hv * dv)
    sizes = {"qkv": 2 * hk * dk + hv * dv, "z": hv * dv, "b": hv, "a": hv}
    matrices = {n: layers.block_weight(rng, rows, hidden, first) for n, rows in sizes.items()}
    matrices["out"] = layers.block_weight(rng, hidden, hv * dv, second)
    weights = ops.DeltaWeights.of(**matrices)
    _, *vectors = layers.gated_delta_arrays(rng, *shape).values()
    norm = rng.uniform(0.5, 1.5, hidden).astype("f4")
    x = rng.standard_normal((2, 3, hidden)).astype("f4")
    sizes = {"heads": (hk, hv), "head_dims": (dk, dv)}
    states = [v.copy() for v in vectors[4:]]
    want = ops.gated_delta_block(x, norm, weights, *vectors[:4], *states, **sizes)
    with metal.installed(check=True) as log:
        out = mlx_gpu_delta.gated_delta_block(
            mx.array(x), mx.array(norm), weights, *map(mx.array, vectors), **sizes
        )
        got = [np.array(a) for a in out]
    assert len(log) == 3
    for a, b in zip(got, [want, *states], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)
