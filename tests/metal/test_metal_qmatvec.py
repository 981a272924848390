"""A weight times a few tokens on Metal, in the simulator: bits, bounds, traffic and limits."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_cases import check, to_numpy
from product_cases import MODEL, normed, signs
from simt import metal

from hadamoe import Instance, Rotation, Weight, mlx_gpu, ops, reference
from hadamoe.verify import bounds, cases, claims, samples

pytestmark = pytest.mark.skipif(metal.missing() is not None, reason=str(metal.missing()))


def product(x: np.ndarray, *weights: Weight, **options) -> np.ndarray:
    packed = ops.pack(*weights)
    packed = packed if isinstance(packed, tuple) else (packed,)
    y = mlx_gpu.product(mx.array(x), mlx_gpu.resident(*packed), **options)
    return to_numpy(y)


def close(got: np.ndarray, x: np.ndarray, w: Weight, chain: int = 0) -> None:
    """Within f32's bound of x @ W^T, where x itself has `chain` roundings."""
    want = reference.qmatmul(x, w).reshape(got.shape)
    bound = bounds.qmatmul_bound(x, w, want, "f32")
    size = np.abs(x) @ np.abs(samples.values(w).reshape(-1, w.columns)).T
    assert (np.abs(got - want) <= bound + claims.gamma(chain) * size + 1e-30).all()


@pytest.mark.parametrize("inst", ops.instances(), ids=str)
def test_exact(inst):
    """On integers, with tails, several tokens, parts and experts; every finding is an error."""
    with metal.installed(check=True):
        for case in list(cases.qmatmul_cases(inst, "integer"))[2::3]:
            check(case)


@pytest.mark.parametrize("inst", ops.instances(), ids=str)
@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_bound(inst, dtype):
    with metal.installed():
        check(list(cases.qmatmul_cases(inst, "gaussian", dtype=dtype))[3])


def test_the_bound_finds_a_wrong_code(rng):
    w = samples.random_weight(rng, Instance("linear", 4, "f32"), 8, 64, kind="gaussian")
    part = w.parts[0][0]
    codes = part.codes.copy()
    codes[3, 5] ^= 1
    broken = Weight(64, ((replace(part, codes=codes),),))
    x = rng.standard_normal((1, 64)).astype("f4")
    with metal.installed():
        got = product(x, broken)
    close(got, x, broken)
    with pytest.raises(AssertionError):
        close(got, x, w)


@pytest.mark.parametrize("columns", [2048, 512, 4096, 2048 + 128])
@pytest.mark.parametrize(("inst", "group"), MODEL, ids=str)
def test_every_byte_is_read_once(inst, group, columns, rng):
    w = samples.random_weight(rng, inst, 64, columns, group=group or columns, kind="gaussian")
    x = rng.standard_normal((1, columns)).astype("f4")
    with metal.installed(check=True) as log:
        close(product(x, w), x, w)
    part = w.parts[0][0]
    least = part.nbytes + (0 if part.codebook is None else part.codebook.nbytes)
    assert log[0].traffic["words"][0] <= 1.05 * least


@pytest.mark.parametrize("tokens", [2, 3, 5, 8])
def test_tokens_share_the_codes(tokens, rng):
    w = samples.random_weight(rng, Instance("linear", 4, "bf16"), 40, 2048, kind="gaussian")
    x = rng.standard_normal((tokens, 2048)).astype("f4")
    with metal.installed(check=True) as log:
        close(product(x, w), x, w)
    assert log[0].traffic["words"][0] == w.parts[0][0].nbytes


@pytest.mark.parametrize("variant", list(metal.variants()), ids=str)
@pytest.mark.parametrize(("inst", "group"), MODEL[::4], ids=str)
def test_variants(inst, group, variant, rng):
    w = samples.random_weight(rng, inst, 12, 512, group=group or 512, kind="gaussian")
    x = rng.standard_normal((2, 512)).astype("f4")
    with metal.installed(**variant):
        close(product(x, w), x, w)


@pytest.mark.parametrize("tokens", [1, 2, 3, 9])
@pytest.mark.parametrize("block", [128, None])
def test_norm_and_rotation_on_the_way_in(block, tokens, rng):
    """Weights with and without a rotation, side by side; what the norm adds is in the bound."""
    turn = Rotation(block, signs(rng, block or 384), signs(rng, 128) if block else None)
    turned = samples.random_weight(rng, Instance("codebook", 2, "f16"), 24, 384, kind="gaussian")
    turned = replace(turned, rotation=turn, in_features=320 if block else 384)
    k = turned.in_features
    flat = samples.random_weight(rng, Instance("linear", 8, "bf16"), [9, 2], k, kind="gaussian")
    x, gamma = rng.standard_normal((tokens, k)).astype("f4"), rng.uniform(0.5, 2, k).astype("f4")
    y0 = rng.standard_normal((tokens, 35)).astype("f4")
    with metal.installed(check=True):
        got = product(x, turned, flat, norm=(mx.array(gamma), 1e-6), residual=mx.array(y0)) - y0
        alone = product(x, turned, norm=(mx.array(gamma), 1e-6))
    inner = normed(x, gamma)
    wide = reference.hadamard(
        inner.astype("f4"), block=block or 0, pre=turn.pre, post=turn.post
    ).astype("f8")
    # the norm sums k squares, the rotation adds 9 times; a rotated number may cancel
    for y, rotated in ((got[:, :24], True), (got[:, 24:], False), (alone, True)):
        w, a = (turned, wide) if rotated else (flat, inner)
        want = a @ samples.values(w).reshape(-1, w.columns).T
        size = np.abs(inner).sum(-1).max() * np.abs(samples.values(w)).max() + np.abs(y0).max()
        assert np.abs(y - want).max() <= claims.gamma(k + w.columns + 20) * size


def test_the_least_e8m0_scale(rng):
    """2^-127 is no normal number: it must not be flushed before the product is one again."""
    w = samples.random_weight(rng, Instance("e2m1", 4, "e8m0"), 4, 64, kind="integer")
    part = w.parts[0][0]
    scale = np.zeros_like(part.scale)
    scale[3, 1] = 255
    w = Weight(64, ((replace(part, scale=scale),),))
    x = np.full((1, 64), 2.0**20, np.float32)
    for inst in (part.instance, Instance("e2m1_gguf", 4, "e8m0")):
        if inst != part.instance:
            codes = reference_codes(part.codes)
            one = replace(part, instance=inst, codes=samples.pack_gguf(codes, scale), scale=None)
            w = Weight(64, ((one,),))
        want = reference.qmatmul(x[:, :], w)[0]
        with metal.installed(ftz=True):
            got = product(x, w)[0]
        np.testing.assert_array_equal(got[:3], want[:3].astype("f4"))
        assert (want[:3] != 0).all()
        assert np.isnan(got[3])


def reference_codes(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)


@pytest.mark.parametrize("inst", [i for i, _ in MODEL], ids=str)
def test_limits(inst, rng):
    """At most 256 threads and 16 KB; without a rotation, less than 9 KB of text.

    MLX hashes a kernel's text at every launch, 1 us for 8 KB.
    """
    w = samples.random_weight(rng, inst, 8, 512, kind="gaussian")
    x, gamma = rng.standard_normal((1, 512)).astype("f4"), mx.ones(512)
    turned = replace(w, rotation=Rotation(128, signs(rng, 128), signs(rng, 128)))
    with metal.installed() as log:
        product(x, w, norm=(gamma, 1e-6))
        product(x, turned, norm=(gamma, 1e-6))
    assert all(np.prod(launch.threadgroup) <= 256 for launch in log)
    assert all(launch.threadgroup_bytes <= 16384 for launch in log)
