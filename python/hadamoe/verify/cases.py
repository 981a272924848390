"""The cases of every op, on random weights of every compiled instance.

Tests, ``hadamoe verify`` and the runners of other CPUs go through the same generators.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from .. import ops, reference
from ..weight import Instance, Part, Rotation, Weight
from . import kv_cases, layers, rounding
from .bounds import qmatmul_bound
from .claims import Case, gamma
from .rounding import Rounded
from .samples import (
    groups_of,
    plain_part,
    random_part,
    random_weight,
    rounded,
    values,
)

#: Numpy dtypes of activations; bf16 goes through torch and MLX arrays.
FLOATS = ("float32", "float16")


def _integers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return rng.integers(-4, 5, shape).astype(dtype)


def columns_of(inst: Instance) -> tuple[int, ...]:
    """Widths that leave a tail after every vector and every byte, where the instance allows one."""
    if inst.scale == "e8m0":
        return (32, 160, 416)
    if inst.table == "linear":
        return (32, 192, 640)
    if inst.table == "codebook":
        return (128, 384) if inst.scale == "f32" else (128, 208, 768)
    return (43, 128, 200) if inst.table == "plain" else (40, 43, 192)


def qmatmul_cases(
    inst: Instance, kind: str, seed: int = 0, dtype: str = "float32"
) -> Iterator[Case]:
    """`ops.qmatmul` of one instance: tails of rows and columns, several tokens, experts, parts."""
    rng = np.random.default_rng([seed, sum(map(ord, str(inst))), kind == "integer"])
    shapes = [(n, t, 0) for n in (1, 7, 34) for t in (1, 3)] + [(33, 17, 0), (19, 2, 3), (6, 9, 5)]
    for i, (rows, tokens, experts) in enumerate(shapes):
        columns = columns_of(inst)[i % len(columns_of(inst))]
        groups = groups_of(inst, columns)
        group = groups[i % len(groups)]
        sizes = [rows] if i % 2 else [rows, 5]
        w = random_weight(
            rng, inst, sizes, columns, group=group, experts=max(experts, 1), kind=kind
        )
        x = (
            _integers(rng, (tokens, columns), dtype)
            if kind == "integer"
            else (rng.standard_normal((tokens, columns)).astype(dtype))
        )
        expert = rng.integers(0, experts, (tokens, 2)).astype(np.int32) if experts else None
        label = f"k={columns} n={w.rows} t={tokens} group={group} experts={experts} {dtype}"
        yield qmatmul_case(inst, kind, label, x, w, expert)


def qmatmul_case(
    inst: Instance | None,
    kind: str,
    label: str,
    x: np.ndarray,
    w: Weight,
    expert: np.ndarray | None,
) -> Case:
    """One call of `ops.qmatmul` against the f64 product with the stored numbers."""
    store = {"float32": "f32", "float16": "f16"}[x.dtype.name]
    x64 = x.astype(np.float64)
    every = x64 @ values(w).reshape(-1, w.columns).T
    bound = qmatmul_bound(x64, w, every, store)

    def chosen(a: np.ndarray) -> np.ndarray:
        if expert is None:
            return a
        return np.take_along_axis(a.reshape(len(x), w.experts, w.rows), expert[..., None], 1)

    return Case(
        "qmatmul", "exact" if kind == "integer" else "bound", label, inst,
        lambda: (ops.qmatmul(x, w, expert=expert),),
        (rounded(chosen(every), store) if kind == "integer" else chosen(every),),
        None if kind == "integer" else (chosen(bound),),
    )  # fmt: skip


def dequantize_cases(inst: Instance, seed: int = 0) -> Iterator[Case]:
    """`ops.dequantize` of one instance: rows in any order, f32 bit for bit, f16 rounded once."""
    rng = np.random.default_rng([seed, sum(map(ord, str(inst)))])
    for kind, dtype in (("integer", "float32"), ("gaussian", "float32"), ("gaussian", "float16")):
        for columns in columns_of(inst):
            group = groups_of(inst, columns)[-1]
            w = random_weight(rng, inst, [7, 4], columns, group=group, experts=3, kind=kind)
            rows = rng.integers(0, 33, 13)
            want = reference.dequantize(w, rows).astype(dtype)
            run = partial(ops.dequantize, w, rows, dtype=np.dtype(dtype))
            label = f"k={columns} group={group} {kind} {dtype}"
            yield Case("dequantize", "exact", label, inst, lambda run=run: (run(),), (want,))


#: (columns, block, which signs, inverse) of the rotations tested: TQ's, JANGTQ's and the extremes.
ROTATIONS = (
    (1, None, "", False),
    (13, None, "pre", False),
    (512, None, "pre", False),
    (768, None, "pre", True),
    (2048, None, "pre", False),
    (300, 128, "pre post", False),
    (512, 128, "pre post", True),
    (64, 16, "post", False),
    (5, 4, "pre", False),
    (16384, 16384, "", False),
)


def hadamard_cases(seed: int = 0, dtype: str = "float32") -> Iterator[Case]:
    """`ops.hadamard`, bit for bit the reference: tails, both signs, inverse."""
    rng = np.random.default_rng(seed)
    for columns, block, signs, inverse in ROTATIONS:
        width = ops.rotated_columns(columns, block)
        period = block or width
        pre, post = (
            rng.choice(np.float32([-1, 1]), period) if side in signs.split() else None
            for side in ("pre", "post")
        )
        x = rng.standard_normal((3, columns)).astype(dtype)
        first, last = (post, pre) if inverse else (pre, post)
        want = reference.hadamard(x, block=block or 0, pre=first, post=last).astype(dtype)
        run = partial(ops.hadamard, x, block=block, pre=pre, post=post, inverse=inverse)
        label = f"k={columns} block={block} {signs} inverse={inverse} {dtype}"
        yield Case("hadamard", "exact", label, None, lambda run=run: (run(),), (want,))


#: b, t, hk, hv, dk, dv, taps: the model's heads, tails of every vector.
DELTAS = (
    (1, 3, 1, 2, 128, 128, 4),
    (2, 4, 2, 4, 16, 24, 4),
    (3, 2, 1, 3, 5, 150, 3),
    (1, 2, 1, 1, 140, 67, 8),
    (2, 3, 2, 4, 1, 1, 1),
)


def gated_delta_cases(seed: int = 0) -> Iterator[Case]:
    """`ops.gated_delta` in f32 within its running error bound; the conv state bit for bit."""
    rng = np.random.default_rng(seed)
    for shape in DELTAS:
        arrays = layers.gated_delta_arrays(rng, *shape)
        y, state = rounding.gated_delta(**arrays, hk=shape[2], eps=1e-6)
        _, conv_state, _ = reference.gated_delta(**arrays, hk=shape[2], eps=1e-6)

        def run(arrays=arrays, shape=shape) -> tuple[np.ndarray, ...]:
            fresh = {k: a.copy() for k, a in arrays.items()}
            y = ops.gated_delta(*fresh.values(), heads=shape[2:4], head_dims=shape[4:6], eps=1e-6)
            return y, fresh["conv_state"], fresh["state"]

        label = "b={} t={} hk={} hv={} dk={} dv={} taps={}".format(*shape)
        want, bound = (y.value, conv_state, state.value), (y.error, 0 * conv_state, state.error)
        yield Case("gated_delta", "bound", label, None, run, want, bound)


def _picks(rng: np.random.Generator, rows: int, columns: int) -> Part:
    """A plain matrix whose every row picks one column, with a sign."""
    w = np.zeros((rows, columns), np.float32)
    w[np.arange(rows), rng.integers(1, columns, rows)] = rng.choice([-1, 1], rows)
    return plain_part(w)


def _first_column(values: np.ndarray, columns: int) -> Part:
    """A plain matrix that is zero but for its first column."""
    w = np.zeros((len(values), columns), np.float32)
    w[:, 0] = values
    return plain_part(w)


def moe_decode_cases(inst: Instance, seed: int = 0) -> Iterator[Case]:
    """`ops.moe_decode` of one instance, exactly, in ``gate_up`` and in ``down``.

    x starts with 1. The router's logits are integers, two of them largest, so both chosen experts
    weigh 1/2; gates are 32, where silu is the identity in f32, and the shared gate is 64, where the
    sigmoid is 1. The other matrix of each pair picks single columns, so sums stay within 24 bits.
    """
    rng = np.random.default_rng([seed, *map(ord, str(inst))])
    columns, inner, experts = columns_of(inst)[1], 96, 5
    for role, tokens in (("gate_up", 3), ("down", 1), ("gate_up", 1), ("down", 19)):

        def ups(role=role) -> Part:
            if role != "gate_up":
                return _picks(rng, inner, columns)
            return random_part(rng, inst, inner, columns, groups_of(inst, columns)[0])

        def downs(role=role) -> Part:
            if role != "down":
                return _picks(rng, columns, inner)
            return random_part(rng, inst, columns, inner, groups_of(inst, inner)[0])

        gates = _first_column(np.full(inner, 32), columns)
        logits = np.float32([3, 9, -2, 9, 5])
        weights = {
            "router": Weight(columns, ((_first_column(logits, columns),),)),
            "gate_up": Weight(columns, tuple((gates, ups()) for _ in range(experts))),
            "down": Weight(inner, tuple((downs(),) for _ in range(experts))),
            "shared_gate_up": Weight(columns, ((gates, ups()),)),
            "shared_down": Weight(inner, ((downs(),),)),
            "shared_gate": Weight(columns, ((_first_column(np.float32([64]), columns),),)),
        }
        x = _integers(rng, (tokens, columns), "float32")
        x[:, 0] = 1
        y = np.zeros((tokens, columns))
        for e, share in ((1, 0.5), (3, 0.5), (-1, 1.0)):
            pair = ("shared_gate_up", "shared_down") if e < 0 else ("gate_up", "down")
            one = (replace(w, parts=(w.parts[max(e, 0)],)) for w in map(weights.get, pair))
            up, down = (values(w)[0] for w in one)
            y += share * (32.0 * (x @ up[inner:].T)) @ down.T
        run = partial(ops.moe_decode, x, ops.MoeWeights.of(**weights), top_k=2)
        label = f"{role} k={columns} inner={inner} t={tokens}"
        yield Case("moe_decode", "exact", label, inst, lambda run=run: (run(),), (y,))


def _product(x: Rounded, w: Weight) -> Rounded:
    """x ``[r, k]`` through the weight's rotation and every row of the weight, ``[r, E, n]``."""
    if w.rotation is not None:
        r, k = w.rotation, x.value.shape[-1]
        turn = reference.hadamard(
            np.eye(k, dtype=np.float32), block=r.block or 0, pre=r.pre, post=r.post
        )
        size, chain = (np.abs(x.value) + x.error) @ np.abs(turn), k.bit_length() + 4
        x = Rounded(x.value @ turn, x.error @ np.abs(turn) + gamma(chain) * size)
    rows = values(w).reshape(-1, w.columns)
    y = x.value @ rows.T
    bound = qmatmul_bound(np.abs(x.value) + x.error, w, y, "f32")
    shape = (len(y), w.experts, w.rows)
    return Rounded(y.reshape(shape), (x.error @ np.abs(rows).T + bound).reshape(shape))


def moe_decode_bound(x: np.ndarray, moe: dict[str, Weight], top_k: int) -> Rounded:
    """y of a normalised `ops.moe_decode` and its largest error, operation by operation.

    Raises:
        AssertionError: rounding could choose other experts, which no bound can cover.
    """
    start = Rounded(x.astype(np.float64), np.zeros(x.shape))

    def pick(every: Rounded, chosen: np.ndarray) -> Rounded:
        return every.each(lambda a: np.take_along_axis(a, chosen[:, None, None], 1)[:, 0])

    def swiglu(both: Rounded) -> Rounded:
        gate, up = (
            both[:, i : i + both.value.shape[1] // 2] for i in (0, both.value.shape[1] // 2)
        )
        return gate * rounding.sigmoid(gate) * up

    logits = _product(start, moe["router"])[:, 0]
    order = np.argsort(-logits.value, -1, kind="stable")
    least, next_ = (logits.value - s * logits.error for s in (1, -1))
    kept, rest = (
        np.take_along_axis(a, o, -1)
        for a, o in ((least, order[:, :top_k]), (next_, order[:, top_k:]))
    )
    assert (kept.min(-1) > rest.max(-1, initial=-np.inf)).all(), "two experts are too close"
    p = (logits - logits.each(lambda a: np.take_along_axis(a, order[:, :1], -1))).exp()
    p = p / p.sum(-1)
    share = p.each(lambda a: np.take_along_axis(a, order[:, :top_k], -1))
    share = share / share.sum(-1)
    shared = swiglu(_product(start, moe["shared_gate_up"])[:, 0])
    gate = rounding.sigmoid(_product(start, moe["shared_gate"])[:, 0])
    terms = [gate * _product(shared, moe["shared_down"])[:, 0]]
    gate_up = _product(start, moe["gate_up"])
    for i in range(top_k):
        down = _product(swiglu(pick(gate_up, order[:, i])), moe["down"])
        terms.append(share[:, i : i + 1] * pick(down, order[:, i]))
    both = (np.stack([getattr(t, name) for t in terms]) for name in ("value", "error"))
    return Rounded(*both).sum(0)[0]


def moe_decode_gaussian_case(inst: Instance, seed: int = 0) -> Case:
    """`ops.moe_decode` on Gaussian data, within `moe_decode_bound`; a rotation where one exists."""
    rng = np.random.default_rng([seed, *map(ord, str(inst))])
    columns, inner, experts, top_k = columns_of(inst)[1], 96, 6, 3
    width, rotations = inner, (None, None)
    if inst.table == "codebook" and inst.scale == "f32":  # TQ: blocks of 128, both signs
        width, rotations = (
            128,
            [Rotation(128, *rng.choice(np.float32([-1, 1]), (2, 128))) for _ in range(2)],
        )
    elif inst.table == "codebook":  # JANGTQ: powers of two, signs before
        rotations = [Rotation(None, rng.choice(np.float32([-1, 1]), k)) for k in (columns, inner)]

    def stack(rows: list[int], k: int, rotation: Rotation | None) -> Weight:
        return replace(
            random_weight(rng, inst, rows, k, experts=experts, kind="gaussian"), rotation=rotation
        )

    def dense(rows: int, k: int) -> Weight:
        return Weight(k, ((plain_part(rng.standard_normal((rows, k)) / np.sqrt(k)),),))

    moe = {
        "router": dense(experts, columns),
        "gate_up": stack([inner, inner], columns, rotations[0]),
        "down": stack([columns], width, rotations[1]),
        "shared_gate_up": dense(2 * inner, columns),
        "shared_down": dense(columns, inner),
        "shared_gate": dense(1, columns),
    }
    x = rng.standard_normal((2, columns)).astype(np.float32)
    y = moe_decode_bound(x, moe, top_k)
    label = f"k={columns} inner={inner} t={len(x)}"
    run = partial(ops.moe_decode, x, ops.MoeWeights.of(**moe), top_k=top_k)
    return Case("moe_decode", "bound", label, inst, lambda: (run(),), (y.value,), (y.error,))


def by_op_and_instance(
    seed: int = 0,
) -> Iterator[tuple[tuple[str, Instance | None], list[Case]]]:
    """Every op with every instance of this build: ((op, instance or None), its cases)."""
    yield ("hadamard", None), [c for t in FLOATS for c in hadamard_cases(seed, t)]
    yield ("gated_delta", None), list(gated_delta_cases(seed))
    exact = layers.exact_attention_case(seed)
    yield ("attention", None), [exact, *layers.attention_cases(seed)]
    yield ("qmatmul_top", None), list(layers.qmatmul_top_cases(seed))
    for op in layers.BLOCKS:
        yield (op, None), list(layers.block_cases(op, seed))
    for op, group in kv_cases.cases(seed):
        yield (op, None), group
    for inst in ops.instances():
        yield ("dequantize", inst), list(dequantize_cases(inst, seed))
    for inst in ops.instances():
        exact = list(moe_decode_cases(inst, seed))
        yield ("moe_decode", inst), [*exact, moe_decode_gaussian_case(inst, seed)]
    for inst in ops.instances():
        both = [
            c
            for kind, t in (
                ("integer", "float32"),
                ("gaussian", "float32"),
                ("gaussian", "float16"),
            )
            for c in qmatmul_cases(inst, kind, seed, t)
        ]
        yield ("qmatmul", inst), both
