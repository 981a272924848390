"""qmatmul: exact on integers, within rounding on Gaussians, for every instance on every ISA."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from product_cases import chain_alone, one_column
from support import at_page_end, weight_at_page_ends

from hadamoe import _cpu, ops, reference
from hadamoe.errors import ContractError
from hadamoe.verify import bounds, claims
from hadamoe.verify.cases import qmatmul_cases
from hadamoe.verify.samples import (
    pack_bits,
    random_part,
    random_weight,
    to_storage,
)
from hadamoe.weight import Instance, Part, Weight

INSTANCES = ops.instances()
#: TQ's Lloyd-Max centroids (8 of 16 mirrored) and JANGTQ's four: nothing a byte could hold.
HALF16 = (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326)
BOOKS = {
    2: np.float32([-1.5104, -0.4528, 0.4528, 1.5104]),
    3: np.float32([-2.1520, -1.3439, -0.7560, -0.2451, 0.2451, 0.7560, 1.3439, 2.1520]),
    4: np.float32([-c for c in HALF16[::-1]] + list(HALF16)),
}


def with_book(weight: Weight, book: np.ndarray) -> Weight:
    parts = tuple(tuple(replace(p, codebook=book) for p in expert) for expert in weight.parts)
    return replace(weight, parts=parts)


def run(x, weight: Weight, expert=None, dtype=np.float32) -> np.ndarray:
    """The native op on NaN-filled memory; every input ends at an unmapped page."""
    w = ops.pack(weight_at_page_ends(weight))
    shape = (len(x), w.rows) if expert is None else (*expert.shape, w.rows)
    y = np.full(shape, np.nan, dtype)
    expert = None if expert is None else at_page_end(expert)
    _cpu.call("qmatmul", [at_page_end(x), w.parts, expert, *w.buffers], [y], [], [])
    return y


def integers(rng, *shape) -> np.ndarray:
    return rng.integers(-4, 5, shape).astype(np.float32)


@pytest.mark.parametrize("kind", ["integer", "gaussian"])
@pytest.mark.parametrize("instance", INSTANCES, ids=str)
def test_claims(isa, instance, kind):
    for dtype in ("float32", "float16"):
        for case in qmatmul_cases(instance, kind, dtype=dtype):
            claims.check(case)


def groups(instance: Instance, columns: int) -> list[int]:
    if instance.table == "plain":
        return [columns]
    if instance.table == "e2m1_gguf":
        return [32] if columns % 32 == 0 else []
    return [g for g in (32, 64, 96, 128, 256, 2112) if columns % g == 0 and g < columns] + [columns]


#: Below, at and above a vector of 64 codes, 16 groups of 32 and a run of 32 vectors; whole and odd.
COLUMNS = (1, 7, 31, 32, 40, 43, 63, 64, 65, 96, 127, 128, 160, 192, 480, 544, 2048, 2085, 4224)


@pytest.mark.parametrize("instance", INSTANCES, ids=str)
def test_exact_at_every_width_without_reading_on(isa, rng, instance):
    for columns in COLUMNS:
        for group in groups(instance, columns):
            w = random_weight(rng, instance, [17, 2], columns, group=group)
            x = integers(rng, 11, columns)
            want = reference.qmatmul(x, w)
            assert np.array_equal(run(x[:3], w), want[:3]), (columns, group)
            assert np.array_equal(run(x, w), want), (columns, group)


def error_bound(x: np.ndarray, weight: Weight) -> np.ndarray:
    """|error| of any ISA's kernel, from how it adds.

    Chains: two a lane within a group of f32 lanes (g / 8 in the narrowest), then one step a group,
    then 4 for the lanes and 6 for scale, bias, offset and result. Integer kernels round x instead.
    """
    group = min(p.group for e in weight.parts for p in e)
    chain = group // 8 + -(-weight.columns // group) + 10
    terms = np.abs(x) @ bounds.sizes(weight).T
    return claims.gamma(chain) * terms + bounds.fixed_point(x, weight)


@pytest.mark.parametrize("instance", INSTANCES, ids=str)
def test_within_its_rounding_and_a_coarser_kernel_is_not(isa, rng, instance):
    columns = 128
    group = groups(instance, columns)[0]
    w = random_weight(rng, instance, 64, columns, group=group, kind="gaussian")
    if instance.table == "codebook":
        w = with_book(w, BOOKS[instance.bits])
    x = rng.standard_normal((5, columns)).astype(np.float32)
    want, bound = reference.qmatmul(x, w), error_bound(x.astype(np.float64), w)
    assert (np.abs(run(x, w) - want) <= bound).all()
    # mutants: x in 13 bits; one code of each row off by one
    step = np.abs(x).max(-1, keepdims=True) / 4095
    assert (np.abs(run(np.round(x / step) * step, w) - want) > bound).any()
    if instance.table != "plain":
        part = w.parts[0][0]
        codes = part.codes.copy()
        codes[:, -1] ^= 1
        mutant = replace(w, parts=((replace(part, codes=codes),),))
        assert (np.abs(run(x, mutant) - want) > bound).any()


@pytest.mark.parametrize("instance", INSTANCES, ids=str)
def test_error_of_a_real_width_is_that_of_f32(isa, rng, instance):
    for columns in (512, 2048):
        for group in groups(instance, columns):
            w = random_weight(rng, instance, 64, columns, group=group, kind="gaussian")
            if instance.table == "codebook":
                w = with_book(w, BOOKS[instance.bits])
            x = rng.standard_normal((4, columns)).astype(np.float32)
            want = reference.qmatmul(x, w)
            error = np.linalg.norm(run(x, w) - want) / np.linalg.norm(want)
            assert error < 2e-6, (columns, group, error)
            step = np.abs(x).max(-1, keepdims=True) / 32639  # mutant: x in two bytes, not three
            coarse = reference.qmatmul(np.round(x / step) * step, w)
            assert np.linalg.norm(coarse - want) > 2e-6 * np.linalg.norm(want)


@pytest.mark.parametrize("instance", INSTANCES, ids=str)
def test_one_large_input_costs_the_others_no_bits(isa, rng, instance):
    """As much of x in one column as in all others: inputs of real models have such columns."""
    columns = 2048
    for group in groups(instance, columns):
        w = random_weight(rng, instance, 64, columns, group=group, kind="gaussian")
        if instance.table == "codebook":
            w = with_book(w, BOOKS[instance.bits])
        x = rng.standard_normal((4, columns)).astype(np.float32)
        x[:, 7] = 45
        want = reference.qmatmul(x, w)
        assert np.linalg.norm(run(x, w) - want) < 5e-7 * np.linalg.norm(want), group
        coarse = np.round(x * 2.0**16) / 2.0**16  # mutant: 22 bits under 64
        coarse = reference.qmatmul(coarse, w)
        assert np.linalg.norm(coarse - want) > 5e-7 * np.linalg.norm(want)


@pytest.mark.parametrize("instance", INSTANCES, ids=str)
def test_one_column_above_all_others_is_in_the_bound(isa, rng, instance):
    x, w = one_column(rng, instance, 5)
    want = reference.qmatmul(x, w)
    off = np.abs(run(x, w) - want)
    assert (off <= bounds.qmatmul_bound(x, w, want, "f32")).all()
    if isa in ("avx512", "amx") and instance.table not in ("codebook", "plain"):
        assert (off > chain_alone(x, w)).any()


@pytest.mark.parametrize("instance", INSTANCES, ids=str)
def test_a_row_depends_on_nothing_else(isa, rng, instance):
    """Neither the batch, nor the place in it, nor threads, nor other rows of the weight."""
    for columns, group in ((256, groups(instance, 256)[0]), (480, groups(instance, 480)[-1])):
        depends_on_nothing_else(rng, instance, columns, group)


def depends_on_nothing_else(rng, instance: Instance, columns: int, group: int) -> None:
    w = random_weight(rng, instance, 70, columns, group=group, experts=3, kind="gaussian")
    x = rng.standard_normal((29, columns)).astype(np.float32)
    expert = rng.integers(0, 3, (29, 2)).astype(np.int32)
    before = ops.threads()
    want = run(x, w, expert)
    try:
        for threads in (1, 2, 3):
            ops.set_threads(threads)
            assert np.array_equal(run(x, w, expert), want)
            assert np.array_equal(run(x[::-1].copy(), w, expert[::-1].copy()), want[::-1])
            for t in range(29):
                assert np.array_equal(run(x[t : t + 1], w, expert[t : t + 1]), want[t : t + 1])
    finally:
        ops.set_threads(before)
    one = Weight(columns, (w.parts[expert[0, 0]],))
    assert np.array_equal(run(x[:1], one), want[0, :1])


@pytest.mark.parametrize("instance", INSTANCES, ids=str)
def test_avx512_and_amx_give_the_same_bits(rng, instance):
    """Of those this machine has; tests/native/test_amx.py runs both where AVX-512 is."""
    found = set()
    before = ops.isa()
    w = random_weight(rng, instance, [33, 20], 480, group=groups(instance, 480)[0], kind="gaussian")
    x = rng.standard_normal((37, 480)).astype(np.float32)
    try:
        for isa in ops.isas():
            if isa in ("avx512", "amx"):
                ops.set_isa(isa)
                found.add(run(x, w).tobytes())
    finally:
        ops.set_isa(before)
    assert len(found) <= 1


def test_experts_of_different_instances(isa, rng):
    """Super-experts: other widths, other groups, other parts; an expert twice for one token."""
    kinds = [
        Instance("linear_signed", 4, "bf16"),
        Instance("linear_signed", 8, "bf16"),
        Instance("codebook", 3, "f32"),
        Instance("plain", 16, "bf16"),
        Instance("e2m1_gguf", 4, "e8m0"),
    ]
    parts = [
        random_part(rng, k, 6, 192, g) for k, g in zip(kinds, (32, 192, 64, 192, 32), strict=True)
    ]
    small = random_part(rng, kinds[0], 3, 192, 96)
    w = Weight(192, (*((p,) for p in parts), (small, small)))
    x = integers(rng, 9, 192)
    expert = rng.integers(0, 6, (9, 4))
    expert[3] = 5
    assert np.array_equal(run(x, w, expert), reference.qmatmul(x, w, expert))


@pytest.mark.parametrize("table", ["e2m1", "e2m1_gguf"])
def test_scales_at_both_ends_of_e8m0(isa, rng, table):
    inst = Instance(table, 4, "e8m0")
    for byte, top in ((0, 4), (1, 4), (126, 4), (253, 1), (254, 1)):
        w = random_weight(rng, inst, 16, 96, group=32)
        part = w.parts[0][0]
        if table == "e2m1_gguf":
            codes = part.codes.copy().reshape(16, 3, 17)
            codes[..., 0] = byte
            part = replace(part, codes=codes.reshape(16, -1))
        else:
            part = replace(part, scale=np.full_like(part.scale, byte))
        w = Weight(96, ((part,),))
        x = np.zeros((2, 96), np.float32)
        x[0, rng.integers(0, 96)] = top
        x[1, :3] = 1, -1, 1
        with np.errstate(over="ignore", invalid="ignore"):
            want = reference.qmatmul(x, w).astype(np.float32)
            finite = np.isfinite(want) & (np.abs(reference.qmatmul(x, w)) < 2.0**126)
        assert np.array_equal(run(x, w)[finite], want[finite]), byte


def test_integers_of_23_bits_are_exact_and_powers_of_two_do_not_overflow(isa):
    w = Weight(64, ((Part(Instance("linear", 2, "f32"), 1, 64, np.full((1, 16), 0x55, np.uint8),
                          np.ones((1, 1), np.float32)),),))  # fmt: skip
    for top in (
        1.0,
        2.0,
        64.0,
        127.0,
        128.0,
        2.0**22,
        8355711.0,
        2.0**100,
        2.0**-126,
        3 * 2.0**-149,
    ):
        for sign in (1, -1):
            x = np.zeros((1, 64), np.float32)
            x[0, 5] = sign * top
            assert run(x, w)[0, 0] == x[0, 5]
    x = np.zeros((1, 64), np.float32)
    assert run(x, w)[0, 0] == 0
    for bad in (np.inf, np.nan):
        x[0, 7] = bad
        assert not np.isfinite(run(x, w)).any()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("book", ["negated", "lopsided", "equal", "wide"])
def test_any_codebook(isa, rng, bits, book):
    """Descending, asymmetric, constant, and integers of more than a byte."""
    step = np.arange(1 << bits, dtype=np.float32)
    c = {
        "negated": -BOOKS[bits],
        "lopsided": np.abs(BOOKS[bits]) + np.float32(0.1) * step,
        "equal": 0 * step - 3,
        "wide": step * 1000 - 700,
    }[book]
    w = with_book(random_weight(rng, Instance("codebook", bits, "f32"), 20, 256, group=128), c)
    x = integers(rng, 3, 256)
    want = reference.qmatmul(x, w)
    if book in ("equal", "wide"):
        assert np.array_equal(run(x, w), want)
    else:
        assert np.linalg.norm(run(x, w) - want) < 1e-6 * np.linalg.norm(want)


def test_bf16_tokens_and_results(isa, rng):
    torch = pytest.importorskip("torch")
    w = random_weight(rng, Instance("linear", 4, "bf16"), 33, 128, group=64)
    packed = ops.pack(w)
    x = torch.from_numpy(integers(rng, 3, 128)).bfloat16()
    y = torch.full((3, 33), torch.nan, dtype=torch.bfloat16)
    _cpu.call("qmatmul", [x, packed.parts, None, *packed.buffers], [y], [], [])
    want = reference.qmatmul(x.float().numpy(), w).astype(np.float32)
    assert torch.equal(y, torch.from_numpy(want).bfloat16())


def test_nothing_to_do(rng):
    w = random_weight(rng, Instance("linear", 4, "bf16"), 5, 64, experts=2)
    assert run(np.zeros((0, 64), np.float32), w, np.zeros((0, 3), np.int32)).shape == (0, 3, 5)
    assert run(np.zeros((2, 64), np.float32), w, np.zeros((2, 0), np.int64)).shape == (2, 0, 5)


#: Dimensions a message lists: known from all arguments, or before the weight is read.
ALL, INPUTS = " [a=2 k=64 n=5 r=2]", " [a=2 k=64 r=2]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((2, 63), np.float32)},
         "parts[0,0] has group=32, needs 63 or a multiple of 32 that divides it "
         "[a=2 k=63 n=5 r=2]"),
        ({"x": np.zeros((2, 64), np.int32)}, "x is i32, needs f32 bf16 f16 [k=64 r=2]"),
        ({"x": np.zeros(64, np.float32)}, "x has 1 dimensions, needs 2"),
        ({"x": np.zeros((2, 0), np.float32)}, "x has k=0, needs at least 1 [k=0 r=2]"),
        ({"x": np.zeros((2, 128), np.float32)[:, ::2]},
         "x is not contiguous, needs row-major [k=64 r=2]"),
        ({"x": np.zeros((2, 96), np.float32)},
         "parts[0,0] has row_bytes=32, needs at least 48 [a=2 k=96 r=2]"),
        ({"y": np.zeros((2, 2, 4), np.float32)}, f"y has n=4, needs 5{ALL}"),
        ({"y": np.zeros((2, 3, 5), np.float32)}, f"y has a=3, needs 2{ALL}"),
        ({"y": np.zeros((3, 2, 5), np.float32)}, f"y has r=3, needs 2{ALL}"),
        ({"y": np.zeros((2, 5), np.float32)}, f"y has 2 dimensions, needs 3{ALL}"),
        ({"y": np.zeros((2, 2, 5))}, f"y is f64, needs f32 bf16 f16{ALL}"),
        ({"expert": np.array([[0, 1], [2, -1]])}, f"expert[1,1] is -1, needs 0..2{ALL}"),
        ({"expert": np.array([[0, 3], [0, 0]], np.int32)}, f"expert[0,1] is 3, needs 0..2{ALL}"),
        ({"expert": np.zeros((3, 2), np.int32)}, "expert has r=3, needs 2 [k=64 r=2]"),
        ({"expert": np.zeros((2, 2), np.uint8)}, f"expert is u8, needs i32 i64{INPUTS}"),
        ({"expert": None, "y": np.zeros((2, 5), np.float32)},
         "parts has 3 experts, needs 1 without expert [k=64 n=5 r=2]"),
        ({"group": 0}, f"parts[0,0] has group=0, needs a positive number{INPUTS}"),
        ({"group": 48},
         f"parts[0,0] has group=48, needs 64 or a multiple of 32 that divides it{ALL}"),
        ({"ints": [1]}, "has 1 ints, needs 0"),
        ({"extra": np.zeros((2, 2), np.uint8)}, f"buffers[9] has 2 dimensions, needs 1{INPUTS}"),
    ],
)  # fmt: skip
def test_rejects(rng, changes, message):
    packed = ops.pack(random_weight(rng, Instance("linear", 4, "bf16"), 5, 64, group=32, experts=3))
    parts = packed.parts.copy()
    if "group" in changes:
        parts[0, 0, 2] = changes["group"]
    x = changes.get("x", np.zeros((2, 64), np.float32))
    expert = changes.get("expert", np.array([[0, 1], [2, 0]]))
    y = changes.get("y", np.zeros((2, 2, 5), np.float32))
    y.fill(np.nan)
    buffers = [*packed.buffers, *([changes["extra"]] if "extra" in changes else [])]
    with pytest.raises(ContractError) as error:
        _cpu.call("qmatmul", [x, parts, expert, *buffers], [y], changes.get("ints", []), [])
    assert str(error.value) == f"qmatmul: {message}"
    assert np.isnan(y).all()


def test_codes_are_one_bit_stream(rng):
    """The packing the kernels read is MLX's: code i at bit i * bits of the row, low bit first."""
    codes = np.arange(16).reshape(1, 16) % 8
    assert pack_bits(codes, 3).tobytes() == sum(
        int(c) << 3 * i for i, c in enumerate(codes[0])
    ).to_bytes(6, "little")
    assert to_storage(np.float32([1.0]), "bf16")[0] == 0x3F80
