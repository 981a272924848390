"""A weight times a prompt on CUDA, in the simulator: tensor cores' tiles.

With three bytes of x a result is as exact as any f32 product, with two as `two_bytes` says.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cuda_cases import FRONT, to_numpy, to_torch
from product_cases import INSTANCE, TABLES, chain_alone, one_column
from simt import cuda

from hadamoe import Instance, Rotation, Weight, cuda_tiles, gpu_calls, ops, reference
from hadamoe.gpu_plan import Step
from hadamoe.packed import pack
from hadamoe.verify import bounds, cases, claims, samples
from hadamoe.verify.samples import values

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))

MEMORY = {"threadgroup_limit": cuda_tiles.SHARED}


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def resident(w: Weight) -> gpu_calls.Resident:
    return gpu_calls.resident(FRONT, pack(w))


def product(x, w: Weight, expert=None, residual=None, few: int | None = None, **options):
    """x @ W^T by tiles, however few tokens; few: `cuda_tiles.FEW` for this product."""
    r, x, slots = resident(w), to_torch(x), 0 if expert is None else expert.shape[1]
    before = cuda_tiles.FEW
    cuda_tiles.FEW = before if few is None else few
    dtype = gpu_calls.dtype_name(x.dtype)
    arrays = r.arrays | {"x": x, "residual": to_torch(residual)}
    if slots:
        flat = expert.reshape(-1)
        order = np.argsort(flat, kind="stable").astype(np.int32)
        arrays |= {"order": to_torch(order), "expert": to_torch(flat[order])}
    try:
        steps = cuda_tiles.qmatmul(
            len(x), r.plan, dtype, slots=slots, residual=residual is not None
        )
        if slots:
            steps.insert(0, Step(cuda_tiles.schedule(len(x), r.plan, slots), "tiles"))
    finally:
        cuda_tiles.FEW = before
    with cuda.installed(**MEMORY, **options) as log:
        y = to_numpy(gpu_calls.run_all(FRONT, steps, arrays))
    assert all(launch.threadgroup_bytes <= cuda_tiles.SHARED for launch in log)
    return y


def operands(rng, inst, tokens, kind="gaussian", rows=(34, 5), columns=None, **options):
    columns = columns or cases.columns_of(inst)[-1]
    w = samples.random_weight(rng, inst, list(rows), columns, kind=kind, **options)
    if kind == "integer":
        return rng.integers(-4, 5, (tokens, columns)).astype("f4"), w
    return rng.standard_normal((tokens, columns)).astype("f4"), w


def check_exact(x, w, expert=None, **options):
    """Integers: no result is off."""
    case = cases.qmatmul_case(None, "integer", f"t={len(x)}", x, w, expert)
    claims.compare(case, (product(x, w, expert, **options),))


def bound(x: np.ndarray, w: Weight, planes: int) -> np.ndarray:
    """Largest |error| of f32 x @ W^T.

    Numbers of 16 or 32 bits are sums of ``planes`` numbers of 8; tensor cores add them in a chain,
    cutting where f32 rounds. Of all others, f32 joins the integers of 32 columns or more in one.
    """
    terms = np.abs(x) @ bounds.sizes(w).T
    if w.parts[0][0].instance.table == "plain":
        return (3 * 2.0 ** (-8 * planes - 1) + claims.gamma(2 * w.columns + 8)) * terms
    chain = 2 * -(-w.columns // 32) + 8
    return bounds.fixed_point(x, w, planes) + claims.gamma(chain) * terms


@pytest.mark.parametrize("few", [0, 64])
@pytest.mark.parametrize("warpgroups", [False, True])
@pytest.mark.parametrize("inst", ops.instances(), ids=str)
def test_exact(inst, warpgroups, few, rng):
    for columns in cases.columns_of(inst)[warpgroups or few > 0 :]:
        for group in samples.groups_of(inst, columns):
            operand = operands(rng, inst, 9, "integer", columns=columns, group=group)
            options = {"warpgroups": warpgroups, "check": warpgroups == (few > 0)}
            check_exact(*operand, few=few, **options)


@pytest.mark.parametrize("few", [0, 64])
@pytest.mark.parametrize("inst", ops.instances(), ids=str)
def test_bound(inst, few, rng):
    x, w = operands(rng, inst, 33)
    want = x.astype("f8") @ values(w)[0].T
    off = np.abs(product(x, w, few=few, warpgroups=few > 0) - want)
    limit = bound(x.astype("f8"), w, 3 if few else 2)
    assert (off <= limit).all(), f"{(off / limit).max():.3g} of the bound"
    assert (off > 1e-4 * limit).any(), "the bound is no bound"


@pytest.mark.parametrize("few", [0, 64])
@pytest.mark.parametrize("inst", TABLES[:4], ids=str)
def test_one_column_above_all_others_is_in_the_bound(inst, few, rng):
    x, w = one_column(rng, inst, 9)
    off = np.abs(product(x, w, few=few) - x.astype("f8") @ values(w)[0].T)
    assert (off <= bound(x.astype("f8"), w, 3 if few else 2)).all()
    assert (off > chain_alone(x, w)).any()


@pytest.mark.parametrize("inst", TABLES, ids=str)
def test_the_bound_finds_a_lost_byte(inst, rng):
    """x without its lowest byte: eight bits less."""
    x, w = operands(rng, inst, 40)
    want = x.astype("f8") @ values(w)[0].T
    cut = (x.view(np.uint32) & 0xFFFF0000).view("f4")
    assert (np.abs(product(cut, w, few=64) - want) > bound(x.astype("f8"), w, 3)).any()
    assert (np.abs(product(cut, w, few=0) - want) > bound(x.astype("f8"), w, 2)).any()


@pytest.mark.parametrize("tokens", [1, 8, 15, 32, 33, 63, 64, 65, 130])
@pytest.mark.parametrize("rows", [[1], [31, 33], [64], [129, 257]], ids=str)
def test_edges_of_tiles(tokens, rows, rng):
    inst = TABLES[tokens % 5]
    x, w = operands(rng, inst, tokens, "integer", rows, columns=cases.columns_of(inst)[0])
    check_exact(x, w, check=len(rows) == 1, warpgroups=tokens % 2 == 1)


@pytest.mark.parametrize("few", [0, 64])
@pytest.mark.parametrize("inst", TABLES, ids=str)
def test_experts_in_every_mix(inst, few, rng):
    """Some in several tiles, some in one, one with a single pair, one nowhere."""
    x, w = operands(rng, inst, 75, "integer", experts=5)
    expert = rng.choice([0, 1, 3], (75, 2), p=[0.1, 0.2, 0.7]).astype(np.int32)
    expert[40, 1] = 4
    check_exact(x, w, expert, few=few, check=True, warpgroups=few > 0)


def test_experts_of_different_kinds(rng):
    kinds = [Instance("codebook", 2, "f16"), Instance("codebook", 4, "f16"), INSTANCE]
    w = samples.random_weight(rng, kinds, [20, 40], 128, experts=3)
    x = rng.integers(-4, 5, (16, 128)).astype("f4")
    expert = rng.integers(0, 3, (16, 2)).astype(np.int32)
    for warpgroups in (False, True):
        check_exact(x, w, expert, check=True, warpgroups=warpgroups)


@pytest.mark.parametrize("inst", TABLES, ids=str)
def test_no_order_changes_a_bit(inst, rng):
    """Of threads, tokens in a tile, tiles, or a compiler's freedom."""
    x, w = operands(rng, inst, 70, rows=(40,))
    for few in (0, 128):
        want = product(x, w, few=few)
        np.testing.assert_array_equal(product(x, w, few=few, warpgroups=True), want)
        np.testing.assert_array_equal(product(x[61:], w, few=few), want[61:])
        expert = np.zeros((70, 1), np.int32)
        np.testing.assert_array_equal(product(x, w, expert, few=few)[:, 0], want)
        for options in ({"contract": False}, {"schedule": "random", "seed": 3}):
            np.testing.assert_array_equal(product(x[:9], w, few=few, **options), want[:9])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inst", TABLES, ids=str)
def test_sixteen_bits_and_a_residual(inst, dtype, rng):
    x, w = operands(rng, inst, 9, "integer")
    residual = rng.integers(-4, 5, (9, w.rows)).astype("f4")
    want = torch.from_numpy((x @ values(w)[0].T + residual).astype("f4")).to(dtype)
    got = product(to_torch(x).to(dtype), w, None, to_torch(residual).to(dtype), check=True)
    np.testing.assert_array_equal(got, to_numpy(want))


def test_parts_that_read_x_rotated_beside_others(rng):
    turned = samples.random_weight(rng, Instance("codebook", 2, "f16"), [40], 256)
    rotation = Rotation(128, rng.choice(np.float32([-1, 1]), 256))
    turned = replace(turned, rotation=rotation)
    straight = samples.random_weight(rng, [INSTANCE, TABLES[4]], [9, 33], 256)
    x = rng.integers(-4, 5, (20, 256)).astype("f4") * np.float32(2**0.5)
    r = gpu_calls.resident(FRONT, *pack(turned, straight))
    with cuda.installed(check=True, **MEMORY):
        rotated = gpu_calls.hadamard(FRONT, to_torch(x), block=128, pre=rotation.pre, post=None)
        steps = cuda_tiles.qmatmul(20, r.plan, "float32", rotated=True)
        arrays = r.arrays | {"x": to_torch(x), "rotated": rotated}
        got = to_numpy(gpu_calls.run_all(FRONT, steps, arrays))
    want = [to_numpy(rotated).astype("f8") @ values(turned)[0].T]
    limit = [bound(to_numpy(rotated).astype("f8"), turned, 3)]
    for i in range(2):
        one = replace(straight, parts=((straight.parts[0][i],),))
        want.append(x.astype("f8") @ values(one)[0].T)
        limit.append(bound(x.astype("f8"), one, 3))
    assert (np.abs(got - np.concatenate(want, 1)) <= np.concatenate(limit, 1)).all()


def test_prompts_go_through_tiles(rng):
    """A norm, experts whose order the device makes, parts shorter than a padded rotation."""
    x, w = operands(rng, INSTANCE, 9, "integer", columns=128, experts=4)
    expert = rng.integers(0, 4, (9, 2)).astype(np.int32)
    with cuda.installed(**MEMORY) as log:
        arrays = {"expert": to_torch(expert)}
        got = to_numpy(gpu_calls.product(FRONT, to_torch(x), resident(w), **arrays))
    every = (x.astype("f8") @ values(w).reshape(-1, 128).T).reshape(9, 4, -1)
    np.testing.assert_array_equal(got, np.take_along_axis(every, expert[..., None], 1))
    names = ["moe_order", "qmatmul_schedule", "qmatmul_tokens<3>", "qmatmul<3, 32>"]
    assert [launch.name for launch in log] == names

    turn = Rotation(128, rng.choice(np.float32([-1, 1]), 128))
    turned = samples.random_weight(rng, Instance("codebook", 2, "f16"), 7, 384, kind="gaussian")
    turned = replace(turned, rotation=turn, in_features=320)
    flat = samples.random_weight(rng, INSTANCE, 9, 320, kind="gaussian", group=64)
    x, gamma = rng.standard_normal((10, 320)).astype("f4"), np.ones(320, "f4")
    x /= np.sqrt((x * x).mean(-1, keepdims=True))
    r = gpu_calls.resident(FRONT, *pack(turned, flat))
    with cuda.installed(**MEMORY):
        got = gpu_calls.product(FRONT, to_torch(x), r, norm=(to_torch(gamma), 0.0))
    wide = reference.hadamard(x, block=128, pre=turn.pre).astype("f8")
    want = [wide @ values(turned)[0].T, x.astype("f8") @ values(flat)[0].T]
    np.testing.assert_allclose(to_numpy(got), np.concatenate(want, 1), atol=2e-4)


@pytest.mark.parametrize("few", [0, 64])
def test_numbers_of_every_byte(few, rng):
    """Whole numbers that need all bytes of x, or of a codebook's entries, are exact."""
    most = 2**14 if few == 0 else 2**22
    x = rng.integers(-most, most, (9, 256)).astype("f4")
    x[:, ::2] = 0  # sums stay within f32
    x[:, 16:] = 0
    w = samples.random_weight(rng, Instance("linear_signed", 4, "f32"), [17], 256)
    y = product(x, w, few=few, check=True).astype("f8")
    want = x.astype("f8") @ values(w)[0].T
    np.testing.assert_array_equal(y, want.astype("f4"))
    book = samples.random_weight(rng, Instance("codebook", 3, "f32"), [17], 256)
    book.parts[0][0].codebook[:] = rng.integers(-most, most, 8)
    x = rng.integers(-1, 2, (9, 256)).astype("f4")
    x[:, 8:] = 0
    want = x.astype("f8") @ values(book)[0].T
    np.testing.assert_array_equal(product(x, book, few=few), want.astype("f4"))


@pytest.mark.parametrize("inst", TABLES, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_stays_in_its_row(inst, bad, rng):
    x, w = operands(rng, inst, 10)
    want = product(x, w)
    x[3, 7] = bad
    got = product(x, w, check=True)
    assert not np.isfinite(got[3]).any()
    np.testing.assert_array_equal(np.delete(got, 3, 0), np.delete(want, 3, 0))


@pytest.mark.parametrize("few", [0, 64])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_a_codebook_with_what_is_no_number(bad, bits, few, rng):
    """Its part is none, as for a few tokens; the part beside it is as it was."""
    w = samples.random_weight(rng, [Instance("codebook", bits, "f32"), INSTANCE], [20, 9], 128)
    x = rng.integers(-4, 5, (9, 128)).astype("f4")
    w.parts[0][0].codebook[1] = bad
    got = product(x, w, few=few, check=True)
    assert np.isnan(got[:, :20]).all()
    beside = replace(w, parts=(w.parts[0][1:],))
    np.testing.assert_array_equal(got[:, 20:], reference.qmatmul(x, beside))


@pytest.mark.parametrize("size", [2.0**-140, 2.0**-100, 2.0**100, 0.0])
def test_sizes_of_x(size, rng):
    x, w = operands(rng, TABLES[2], 9, "integer")
    x = (x * size).astype("f4")
    np.testing.assert_array_equal(product(x, w), (x.astype("f8") @ values(w)[0].T).astype("f4"))


def test_the_least_e8m0_scale(rng):
    x, w = operands(rng, TABLES[2], 9, "integer")
    w.parts[0][0].scale[...] = 0
    x = x * np.float32(2.0**30)
    np.testing.assert_array_equal(product(x, w), reference.qmatmul(x, w))


def test_a_schedule_of_more_experts_than_threads(rng):
    expert = np.sort(rng.choice(600, 500)).astype(np.int32)
    with cuda.installed(check=True, **MEMORY):
        launch = cuda_tiles.schedule_launch(500, 600, 2)
        (tiles,) = FRONT.run(launch, {"expert": to_torch(expert)})
    want = []
    for e in np.unique(expert):
        first, end = np.searchsorted(expert, [e, e + 1])
        want += [(e, i, min(i + 2, end)) for i in range(first, end, 2)]
    tiles = tiles.numpy()
    assert tiles[0, 0] == len(want)
    np.testing.assert_array_equal(tiles[1 : len(want) + 1, :3], want)
    assert len(want) <= cuda_tiles.most_tiles(500, 600, 2)
