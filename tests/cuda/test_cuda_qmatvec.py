"""A weight times a few tokens on CUDA, in the simulator: bits, bounds, traffic and limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cuda_cases import FRONT, to_numpy, to_torch
from product_cases import MODEL, chain_alone, normed, one_column, signs
from simt import cuda

from hadamoe import Instance, Rotation, Weight, cuda_products, gpu_calls, ops, reference
from hadamoe.gpu_weight import gpu_weight
from hadamoe.verify import bounds, cases, claims, samples

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))


def product(x, *weights: Weight, norm=None, expert=None, residual=None, **options) -> np.ndarray:
    packed = ops.pack(*weights)
    packed = packed if isinstance(packed, tuple) else (packed,)
    options |= {"expert": to_torch(expert), "residual": to_torch(residual)}
    options["norm"] = norm and (to_torch(norm[0]), norm[1])
    return to_numpy(
        gpu_calls.product(FRONT, to_torch(x), gpu_calls.resident(FRONT, *packed), **options)
    )


def close(got: np.ndarray, x: np.ndarray, w: Weight) -> None:
    """Within f32's bound of x @ W^T."""
    want = reference.qmatmul(x, w).reshape(got.shape)
    assert (np.abs(got - want) <= bounds.qmatmul_bound(x, w, want, "f32") + 1e-30).all()


def integers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-4, 5, shape).astype("f4")


@pytest.mark.parametrize("inst", ops.instances(), ids=str)
def test_exact(inst, rng):
    """On integers, at every width and group, parts cut anywhere; every finding is an error."""
    with cuda.installed(check=True):
        for columns in cases.columns_of(inst):
            for group in cases.groups_of(inst, columns):
                w = samples.random_weight(rng, inst, [7, 18], columns, group=group)
                x = integers(rng, 3, columns)
                want = reference.qmatmul(x, w).reshape(3, 25)
                np.testing.assert_array_equal(product(x, w), want)


@pytest.mark.parametrize("inst", ops.instances(), ids=str)
def test_experts(inst, rng):
    """Two of five, whose parts have kinds of their own."""
    columns = cases.columns_of(inst)[1]
    other = Instance("linear", 8, "bf16") if columns % 32 == 0 else inst
    w = samples.random_weight(rng, [inst, other], [18, 3], columns, experts=5)
    x, expert = integers(rng, 3, columns), rng.integers(0, 5, (3, 2)).astype(np.int32)
    every = reference.qmatmul(x, w).reshape(3, 5, 21)
    with cuda.installed(check=True):
        got = product(x, w, expert=expert)
    np.testing.assert_array_equal(got, np.take_along_axis(every, expert[..., None], 1))


@pytest.mark.parametrize("inst", ops.instances(), ids=str)
def test_bound(inst, rng):
    for columns in cases.columns_of(inst):
        for group in cases.groups_of(inst, columns):
            w = samples.random_weight(rng, inst, [7, 18], columns, group=group, kind="gaussian")
            x = rng.standard_normal((2, columns)).astype("f4")
            with cuda.installed():
                close(product(x, w), x, w)


@pytest.mark.parametrize("inst", [i for i in ops.instances() if i.table != "plain"], ids=str)
def test_one_column_above_all_others_is_in_the_bound(inst, rng):
    x, w = one_column(rng, inst, 2)
    with cuda.installed():
        got = product(x, w)
    close(got, x, w)
    assert (np.abs(got - reference.qmatmul(x, w)) > chain_alone(x, w)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype, rng):
    w = samples.random_weight(rng, Instance("linear", 4, "bf16"), 20, 128)
    x = torch.from_numpy(integers(rng, 2, 128)).to(dtype)
    residual = torch.from_numpy(integers(rng, 2, 20)).to(dtype)
    want = torch.from_numpy(reference.qmatmul(x.float().numpy(), w).reshape(2, 20)) + residual
    with cuda.installed():
        weight = gpu_calls.resident(FRONT, ops.pack(w))
        got = gpu_calls.product(FRONT, x, weight, residual=residual)
    assert torch.equal(got, want.to(dtype))


def test_the_bound_finds_a_wrong_code(rng):
    w = samples.random_weight(rng, Instance("linear", 4, "f32"), 8, 64, kind="gaussian")
    part = w.parts[0][0]
    codes = part.codes.copy()
    codes[3, 5] ^= 1
    broken = Weight(64, ((replace(part, codes=codes),),))
    x = rng.standard_normal((1, 64)).astype("f4")
    with cuda.installed():
        got = product(x, broken)
    close(got, x, broken)
    with pytest.raises(AssertionError):
        close(got, x, w)


@pytest.mark.parametrize("columns", [2048, 512, 4096])
@pytest.mark.parametrize(("inst", "group"), MODEL, ids=str)
def test_every_byte_is_read_once(inst, group, columns, rng):
    w = samples.random_weight(rng, inst, 64, columns, group=group or columns, kind="gaussian")
    x = rng.standard_normal((1, columns)).astype("f4")
    with cuda.installed(check=True) as log:
        close(product(x, w), x, w)
    part = w.parts[0][0]
    assert log[0].traffic["words"].unique_read <= 1.05 * part.nbytes + 64
    assert len(log) == 1


@pytest.mark.parametrize(("inst", "group"), MODEL, ids=str)
def test_tokens_together_have_the_bits_of_tokens_alone(inst, group, rng):
    w = samples.random_weight(rng, inst, 40, 640, group=group or 640, kind="gaussian")
    x = rng.standard_normal((8, 640)).astype("f4")
    with cuda.installed():
        alone = np.concatenate([product(row[None], w) for row in x])
        for tokens in (2, 3, 8):
            np.testing.assert_array_equal(product(x[:tokens], w), alone[:tokens])


@pytest.mark.parametrize(("tokens", "together"), [(1, 1), (2, 2), (3, 4), (8, 4)])
def test_tokens_share_the_codes(tokens, together, rng):
    """But for a codebook's."""
    linear, book = Instance("linear", 8, "bf16"), Instance("codebook", 4, "f32")
    for inst, want in ((linear, together), (book, 1)):
        w = gpu_weight(ops.pack(samples.random_weight(rng, inst, 16, 256)))
        launch = cuda_products.qmatvec(tokens, w, "float32")
        assert launch.constants == (want,)
        assert launch.groups[0] == -(-tokens // want)


@pytest.mark.parametrize("options", [{"contract": False}, {"schedule": "random", "seed": 7}])
def test_another_schedule(options, rng):
    w = samples.random_weight(rng, Instance("linear", 6, "bf16"), 20, 640, kind="gaussian")
    x = rng.standard_normal((2, 640)).astype("f4")
    with cuda.installed():
        want = product(x, w)
    with cuda.installed(**options):
        got = product(x, w)
    close(got, x, w)
    if "schedule" in options:
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("tokens", [1, 3, 9])
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
    limit = {"threadgroup_limit": cuda_products.MEMORY}
    with cuda.installed(check=True, **limit):
        got = product(x, turned, flat, norm=(gamma, 1e-6), residual=y0) - y0
        alone = product(x, turned, norm=(gamma, 1e-6), residual=y0[:, :24]) - y0[:, :24]
    inner = normed(x, gamma)
    wide = reference.hadamard(
        inner.astype("f4"), block=block or 0, pre=turn.pre, post=turn.post
    ).astype("f8")
    # the norm sums k squares, the rotation adds 9 times; a rotated number may cancel
    for y, rotated in ((got[:, :24], True), (got[:, 24:], False), (alone, True)):
        w, a = (turned, wide) if rotated else (flat, inner)
        want = a @ samples.values(w).reshape(-1, w.columns).T
        size = np.abs(inner).sum(-1).max() * np.abs(samples.values(w)).max() + np.abs(y0).max()
        fixed = bounds.fixed_point(a, w).max()
        assert np.abs(y - want).max() <= claims.gamma(k + w.columns + 20) * size + fixed


def test_pairs_of_a_prompt(rng):
    """So many that tiles hold several of one expert."""
    w = samples.random_weight(rng, Instance("codebook", 2, "f16"), [18, 3], 256, experts=2)
    w = replace(w, rotation=Rotation(None, signs(rng, 256), None))
    x, expert = integers(rng, 12, 256) * np.float32(16), rng.integers(0, 2, (12, 2)).astype("i4")
    turned = reference.hadamard(x, pre=w.rotation.pre)
    want = reference.qmatmul(turned, w).reshape(12, 2, 21)
    with cuda.installed(check=True, threadgroup_limit=cuda_products.MEMORY):
        got = product(x, w, expert=expert)
    np.testing.assert_array_equal(got, np.take_along_axis(want, expert[..., None], 1))


def test_rows_too_long_for_a_block_to_rotate(rng):
    w = samples.random_weight(rng, Instance("codebook", 4, "f32"), 5, 8192, kind="gaussian")
    w = replace(w, rotation=Rotation(128, signs(rng, 128), None))
    x = rng.standard_normal((1, 8192)).astype("f4")
    with cuda.installed() as log:
        got = product(x, w)
    close(got, reference.hadamard(x, block=128, pre=w.rotation.pre), w)
    assert len(log) == 2


def test_numbers_that_are_none(rng):
    w = samples.random_weight(rng, Instance("linear", 4, "bf16"), 5, 256)
    x = integers(rng, 3, 256)
    x[0, 7], x[1, 200] = np.inf, np.nan
    with cuda.installed():
        got = product(x, w)
    assert np.isnan(got[:2]).all()
    np.testing.assert_array_equal(got[2], reference.qmatmul(x[2:], w).reshape(5))


def test_the_least_e8m0_scale(rng):
    """2^-127 is no normal number, 255 none at all."""
    w = samples.random_weight(rng, Instance("e2m1", 4, "e8m0"), 4, 64)
    part = w.parts[0][0]
    scale = np.zeros_like(part.scale)
    scale[3, 1] = 255
    w = Weight(64, ((replace(part, scale=scale),),))
    x = np.full((1, 64), 2.0**20, np.float32)
    want = reference.qmatmul(x, w)[0]
    with cuda.installed():
        got = product(x, w)[0]
    np.testing.assert_array_equal(got[:3], want[:3].astype("f4"))
    assert np.isnan(got[3])


def test_smallest_and_largest_tokens(rng):
    """A power of two for 128 columns, from the smallest f32 to the largest."""
    w = samples.random_weight(rng, Instance("linear_signed", 8, "f32"), 5, 128)
    for size in (2.0**-149, 2.0**-140, 2.0**-100, 2.0**100):
        x = (integers(rng, 1, 128) * np.float32(size)).astype("f4")
        with cuda.installed():
            got = product(x, w)
        want = reference.qmatmul(x, w).reshape(1, 5)
        np.testing.assert_allclose(got, want, rtol=2**-20, atol=2.0**-149)


def test_shared_memory(rng):
    """Of the model's widths: 48 KB for one token, 96 for any number."""
    for columns in (512, 2048, 4096):
        w = samples.random_weight(rng, Instance("linear", 8, "bf16"), 8, columns)
        turned = replace(w, rotation=Rotation(128, signs(rng, 128), None))
        for one in (w, turned):
            weight = gpu_weight(ops.pack(one))
            for tokens in range(1, 9):
                rotate = one.rotation is not None
                launch = cuda_products.qmatvec(tokens, weight, "float32", rotate=rotate)
                assert launch.shared <= (48 << 10 if tokens == 1 else cuda_products.MEMORY)
