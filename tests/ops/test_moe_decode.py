"""moe_decode: a whole mixture-of-experts block, exact where nothing rounds."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from support import at_page_end

from hadamoe import _cpu, ops, reference
from hadamoe.errors import ContractError
from hadamoe.ops import MoeWeights
from hadamoe.verify.samples import pack_bits, random_weight, to_storage
from hadamoe.weight import Instance, Part, Rotation, Weight, fuse_rows, stack_experts

AFFINE8, MXFP4 = Instance("linear", 8, "bf16"), Instance("e2m1", 4, "e8m0")
TQ4, JANGTQ2 = Instance("codebook", 4, "f32"), Instance("codebook", 2, "f16")
INT4, BF16 = Instance("linear_signed", 4, "bf16"), Instance("plain", 16, "bf16")
ROLES = tuple(f.name for f in fields(MoeWeights))

#: name: (instance of the experts, groups of gate_up and down, instance of the rest, block)
FORMATS = {
    "affine": (Instance("linear", 4, "bf16"), (64, 32), AFFINE8, None),
    "mxfp4": (MXFP4, (32, 32), AFFINE8, None),
    "jangtq": (JANGTQ2, (256, 96), AFFINE8, None),
    "tq": (TQ4, (128, 128), BF16, 128),
    "int4": (INT4, (128, 96), BF16, None),
}


def signs(rng, n: int) -> np.ndarray:
    return rng.choice(np.float32([-1, 1]), n)


def rotations(rng, name: str, hidden: int, inner: int):
    if name == "jangtq":
        return Rotation(None, signs(rng, hidden)), Rotation(None, signs(rng, inner))
    if name == "tq":
        return (Rotation(128, signs(rng, 128), signs(rng, 128)),) * 2
    return None, None


def plain(rng, rows: int, columns: int, dtype: str = "f32") -> Weight:
    w = 0.1 * rng.standard_normal((rows, columns))
    raw = to_storage(w.astype(np.float32), dtype).view(np.uint8).reshape(rows, -1)
    bits = 32 if dtype == "f32" else 16
    return Weight(columns, ((Part(Instance("plain", bits, dtype), rows, columns, raw),),))


def random_moe(rng, name: str, *, hidden: int = 256, inner: int = 96, experts: int = 6) -> dict:
    """Six weights as the format stores them; inner is no power of two and no multiple of 128."""
    kind, groups, rest, block = FORMATS[name]
    turn, turn_inner = rotations(rng, name, hidden, inner)
    width = -(-inner // block) * block if block else inner

    def stack(rows, columns, group, rotation):
        each = [
            random_weight(rng, kind, rows, columns, group=group, kind="gaussian")
            for _ in range(experts)
        ]
        return replace(stack_experts(each), rotation=rotation)

    def dense(rows, columns):
        group = columns if rest.table == "plain" else 32
        w = random_weight(rng, rest, rows, columns, group=group, kind="gaussian")
        if rest.table == "plain":
            return w
        part = w.parts[0][0]  # as small as the experts: bf16 exponents less 2^6
        return replace(w, parts=((replace(part, scale=part.scale - 768, bias=part.bias - 768),),))

    return {
        "router": plain(rng, experts, hidden),
        "gate_up": fuse_rows([stack(inner, hidden, groups[0], turn) for _ in range(2)]),
        "down": stack(hidden, width, groups[1], turn_inner),
        "shared_gate_up": fuse_rows([dense(inner, hidden), dense(inner, hidden)]),
        "shared_down": dense(hidden, inner),
        "shared_gate": plain(rng, 1, hidden, "bf16"),
    }


def run(x, moe: dict, top_k: int, *, normalize: bool = True, dtype=np.float32):
    """The native op on NaN-filled memory: y, expert, weight."""
    packed = MoeWeights.of(**moe)
    arrays, tables, ints = packed.arguments(top_k, normalize)
    y = np.full((len(x), moe["down"].rows), np.nan, dtype)
    expert = np.full((len(x), top_k), -1, np.int32)
    weight = np.full((len(x), top_k), np.nan, np.float32)
    inputs = [at_page_end(x), *arrays, *tables, *packed.router.buffers]
    _cpu.call("moe_decode", inputs, [y, expert, weight], ints, [])
    return y, expert, weight


def distance(a, b) -> float:
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_near_the_reference(isa, rng, name, normalize):
    moe = random_moe(rng, name)
    for tokens in (1, 2, 7):
        x = rng.standard_normal((tokens, 256)).astype(np.float32)
        y, expert, weight = run(x, moe, 3, normalize=normalize)
        want, chosen, p = reference.moe_decode(x, moe, top_k=3, normalize=normalize)
        assert np.array_equal(expert, chosen)
        assert np.abs(weight - p).max() < 1e-6
        assert distance(y, want) < 3e-6
        # mutants: another normalisation, one expert less
        for top_k, other in ((3, not normalize), (2, normalize)):
            mutant = reference.moe_decode(x, moe, top_k=top_k, normalize=other)[0]
            assert distance(y, mutant) > 1e-3


def exact_moe(rng, experts: int, hidden: int, inner: int, tokens: int, turn: bool) -> dict:
    """Weights on which no operation rounds: gates are multiples of 128, where silu(g) = max(g, 0),
    and logits 0 or -200, so that the chosen share one weight and the others have none."""
    inst = Instance("linear_signed", 4, "f32")

    def matrix(values, scale):
        codes = pack_bits(values + 8, 4)
        scales = np.full((len(values), 1), scale, np.float32)
        columns = values.shape[1]
        return Weight(columns, ((Part(inst, len(values), columns, codes, scales),),))

    def sparse(scale):
        values = np.zeros((inner, hidden), np.int64)
        for row in values:
            row[rng.permutation(hidden)[:9]] = rng.integers(-3, 4, 9)
        return matrix(values, scale)

    def down():
        return matrix(rng.integers(-8, 8, (hidden, inner)), 0.5)

    def stack(make):
        w = stack_experts([make() for _ in range(experts)])
        return replace(w, rotation=Rotation(64) if turn else None)

    logits = np.zeros((experts, hidden), np.float32)
    for t in range(tokens):
        logits[rng.permutation(experts)[4:], t] = -200
    raw = logits.view(np.uint8).reshape(experts, -1)
    half = np.zeros((1, hidden), np.float32)
    f32 = Instance("plain", 32, "f32")
    return {
        "router": Weight(hidden, ((Part(f32, experts, hidden, raw),),)),
        "gate_up": fuse_rows([stack(lambda: sparse(128)), stack(lambda: sparse(1))]),
        "down": stack(down),
        "shared_gate_up": fuse_rows([sparse(128), sparse(1)]),
        "shared_down": down(),
        "shared_gate": Weight(hidden, ((Part(f32, 1, hidden, half.view(np.uint8)),),)),
    }


@pytest.mark.parametrize("turn", [False, True])
def test_exact_where_nothing_rounds(isa, rng, turn):
    """Any error in which expert, row, slot, token or rotation shows in full."""
    tokens, hidden, inner = 5, 64, 64
    moe = exact_moe(rng, 9, hidden, inner, tokens, turn)
    x = np.zeros((tokens, hidden), np.float32)
    if not turn:
        x[:, tokens:] = rng.integers(-1, 2, (tokens, hidden - tokens))
    x[np.arange(tokens), np.arange(tokens)] = 8  # rotated: +-1 everywhere
    y, expert, weight = run(x, moe, 4)
    want, chosen, p = reference.moe_decode(x.astype(np.float64), moe, top_k=4)
    assert np.array_equal(expert, chosen)
    assert np.array_equal(weight, p)
    assert np.abs(want).max() > 100
    assert np.array_equal(y, want)


def test_experts_of_different_widths(isa, rng):
    """Super-experts, mixed projections and a padded inner width in one block."""
    moe = random_moe(rng, "affine")
    other = random_moe(rng, "int4")
    for role in ("gate_up", "down"):
        moe[role] = replace(moe[role], parts=moe[role].parts[:3] + other[role].parts[3:])
    x = rng.standard_normal((5, 256)).astype(np.float32)
    assert distance(run(x, moe, 4)[0], reference.moe_decode(x, moe, top_k=4)[0]) < 3e-6


def test_equal_logits_take_the_lower_expert(isa, rng):
    moe = random_moe(rng, "affine")
    raw = np.zeros((6, 256), np.float32)
    raw[[1, 4], 0] = 1
    moe["router"] = Weight(256, ((replace(moe["router"].parts[0][0], codes=raw.view(np.uint8)),),))
    x = np.ones((2, 256), np.float32)
    _, expert, weight = run(x, moe, 4)
    assert expert.tolist() == [[1, 4, 0, 2]] * 2
    assert np.allclose(weight.sum(-1), 1)


def test_a_token_depends_on_nothing_else(isa, rng):
    before = ops.threads()
    for name in FORMATS:
        moe = random_moe(rng, name)
        x = rng.standard_normal((6, 256)).astype(np.float32)
        want = run(x, moe, 3)[0]
        try:
            for threads in (1, 2, 3):
                ops.set_threads(threads)
                assert np.array_equal(run(x, moe, 3)[0], want)
                assert np.array_equal(run(x[::-1].copy(), moe, 3)[0], want[::-1])
                for t in range(6):
                    assert np.array_equal(run(x[t : t + 1], moe, 3)[0], want[t : t + 1])
        finally:
            ops.set_threads(before)


def test_more_tokens_than_one_batch(rng):
    moe = random_moe(rng, "affine", hidden=64, inner=32)
    x = rng.standard_normal((515, 64)).astype(np.float32)
    y = run(x, moe, 2)[0]
    assert np.array_equal(run(x[510:], moe, 2)[0], y[510:])
    assert distance(y, reference.moe_decode(x, moe, top_k=2)[0]) < 3e-6


def test_all_experts_and_f16(isa, rng):
    moe = random_moe(rng, "affine")
    x = (0.1 * rng.standard_normal((2, 256))).astype(np.float16)
    want = reference.moe_decode(x.astype(np.float32), moe, top_k=6)[0]
    y = ops.moe_decode(x, MoeWeights.of(**moe), top_k=6)
    assert y.dtype == np.float16
    assert distance(y.astype(np.float64), want) < 1e-3
    y = run(x, moe, 6)[0]
    assert distance(y, want) < 3e-6


def test_no_tokens(rng):
    moe = random_moe(rng, "affine")
    assert run(np.zeros((0, 256), np.float32), moe, 2)[0].shape == (0, 256)


def some_weight(rows: int, columns: int = 256, experts: int = 1) -> Weight:
    return random_weight(np.random.default_rng(0), INT4, rows, columns, group=32, experts=experts)


DIMS = " [a=3 k=256 t=2]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router": some_weight(5)}, f"router has 5 rows, needs 6{DIMS}"),
        ({"router": some_weight(6, experts=2)}, f"router has 2 experts, needs 1{DIMS}"),
        ({"gate_up": some_weight(191, experts=6)},
         f"gate_up has 191 rows, needs an even number{DIMS}"),
        ({"down": some_weight(255, 96, 6)}, f"down has 255 rows, needs 256{DIMS}"),
        ({"down": some_weight(256, 96, 5)}, f"down has 5 experts, needs 6{DIMS}"),
        ({"down": some_weight(256, 64, 6)},
         f"down[0,0] has row_bytes=32, needs at least 48{DIMS}"),
        ({"shared_gate_up": some_weight(3)},
         f"shared_gate_up has 3 rows, needs an even number{DIMS}"),
        ({"shared_down": some_weight(255, 96)}, f"shared_down has 255 rows, needs 256{DIMS}"),
        ({"shared_gate": some_weight(2)}, f"shared_gate has 2 rows, needs 1{DIMS}"),
        ({"top_k": 0}, "top_k is 0, needs 1..6 [a=0 k=256 t=2]"),
        ({"top_k": 7}, "top_k is 7, needs 1..6 [a=7 k=256 t=2]"),
        ({"mask": 64}, f"rotated is 64, needs 0..63{DIMS}"),
        ({"mask": 2}, f"rotated names readers of x, but hidden_block is -1{DIMS}"),
        ({"mask": 4}, f"rotated names down readers, but inter_block is -1{DIMS}"),
        ({"hidden_block": 3}, f"hidden_block is 3, needs 0 or a power of two up to 16384{DIMS}"),
        ({"mask": 4, "inter_block": 12},
         f"inter_block is 12, needs 0 or a power of two up to 16384{DIMS}"),
        ({"hidden_block": 64, "pre": np.ones(3, np.float32)},
         "hidden_pre has p=3, needs a divisor of 256 [a=3 k=256 p=3 t=2]"),
        ({"hidden_block": 64, "pre": np.ones(64)},
         "hidden_pre is f64, needs f32 [a=3 k=256 p=64 t=2]"),
        ({"x": np.zeros((2, 256), np.int32)}, "x is i32, needs f32 bf16 f16 [k=256 t=2]"),
        ({"y": np.zeros((2, 255), np.float32)}, "y has k=255, needs 256 [k=256 t=2]"),
        ({"y": np.zeros((3, 256), np.float32)}, "y has t=3, needs 2 [k=256 t=2]"),
        ({"expert": np.zeros((2, 2), np.int32)}, "expert has a=2, needs 3 [a=3 k=256 t=2]"),
        ({"expert": np.zeros((2, 3), np.int64)}, "expert is i64, needs i32 [a=3 k=256 t=2]"),
        ({"weight": np.zeros((2, 3))}, "weight is f64, needs f32 [a=3 k=256 t=2]"),
    ],
)  # fmt: skip
def test_rejects(rng, changes, message):
    moe = random_moe(rng, "affine") | {k: v for k, v in changes.items() if k in ROLES}
    packed = MoeWeights(*ops.pack(*(moe[role] for role in MoeWeights.__dataclass_fields__)))
    arrays, tables, ints = packed.arguments(changes.get("top_k", 3), True)
    arrays[0] = changes.get("pre")
    ints[2:] = (
        changes.get("hidden_block", -1),
        changes.get("inter_block", -1),
        changes.get("mask", 0),
    )
    x = changes.get("x", np.zeros((2, 256), np.float32))
    outputs = [
        changes.get("y", np.zeros((2, 256), np.float32)),
        changes.get("expert", np.zeros((2, ints[0]), np.int32)),
        changes.get("weight", np.zeros((2, ints[0]), np.float32)),
    ]
    for out in outputs:
        out.fill(77)
    with pytest.raises(ContractError) as error:
        _cpu.call("moe_decode", [x, *arrays, *tables, *packed.router.buffers], outputs, ints, [])
    assert str(error.value) == f"moe_decode: {message}"
    assert all((out == 77).all() for out in outputs)
