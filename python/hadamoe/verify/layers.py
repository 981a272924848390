"""The cases of attention and of the fused halves of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from .. import ops, reference
from ..weight import Instance, Rotation, Weight
from . import rounding
from .claims import Case
from .samples import plain_part, random_weight, rounded

#: b, t, heads, kv_heads, d, rot, past, capacity: the model's heads, tails of every vector and tile,
#: several blocks of keys, one query against many keys.
ATTENTIONS = (
    (1, 1, 16, 2, 256, 64, 5, 8),
    (2, 5, 4, 2, 24, 8, 3, 9),
    (1, 1, 6, 2, 32, 0, 300, 301),
    (1, 150, 3, 1, 7, 4, 0, 150),
    (3, 3, 2, 2, 16, 16, 126, 131),
)


def attention_arrays(rng, b, t, heads, kv, d, rot, past, capacity) -> dict[str, np.ndarray]:
    """Random f32 arguments of `ops.attention`, by name and in its order."""
    angle = rng.uniform(-9, 9, (b, t, rot // 2))
    angle = np.concatenate([angle, angle], -1)
    arrays = {
        "proj": rng.standard_normal((b, t, 2 * (heads + kv) * d)),
        "q_norm": rng.uniform(0.5, 1.5, d),
        "k_norm": rng.uniform(0.5, 1.5, d),
        "cos": np.cos(angle),
        "sin": np.sin(angle),
        "keys": rng.standard_normal((b, kv, capacity, d)),
        "values": rng.standard_normal((b, kv, capacity, d)),
    }
    return {name: a.astype(np.float32) for name, a in arrays.items()}


def gated_delta_arrays(rng, b, t, hk, hv, dk, dv, taps) -> dict[str, np.ndarray]:
    """Random f32 arguments of `ops.gated_delta`, by name and in its order."""
    c = 2 * hk * dk + hv * dv
    arrays = {
        "proj": rng.standard_normal((b, t, c + hv * dv + 2 * hv)),
        "conv_weight": 0.5 * rng.standard_normal((c, taps)),
        "a_log": np.log(rng.uniform(0.01, 16, hv)),
        "dt_bias": rng.standard_normal(hv),
        "norm": rng.uniform(0.5, 1.5, dv),
        "conv_state": rng.standard_normal((b, c, taps)),
        "state": 0.1 * rng.standard_normal((b, hv, dk, dv)),
    }
    return {name: a.astype(np.float32) for name, a in arrays.items()}


def padding(rng, b: int, t: int, past: int, capacity: int) -> np.ndarray:
    """A causal mask [b, t, capacity] of sequences with 0, 1, 2 ... padded tokens in front."""
    seen = np.arange(capacity) <= past + np.arange(t)[:, None]
    return seen & (np.arange(capacity) >= np.arange(b)[:, None, None])


def attention_cases(seed: int = 0) -> Iterator[Case]:
    """`ops.attention` in f32 within its running error bound, causal and padded; caches too."""
    rng = np.random.default_rng(seed)
    for shape in ATTENTIONS:
        b, t, heads, *_, past, capacity = shape
        arrays = attention_arrays(rng, *shape)
        for mask in (None, padding(rng, b, t, past, capacity)):
            options = {"heads": heads, "past": past, "mask": mask, "eps": 1e-6}
            bounded = rounding.attention(**arrays, **options)

            def run(arrays=arrays, options=options) -> tuple[np.ndarray, ...]:
                fresh = {k: a.copy() for k, a in arrays.items()}
                y = ops.attention(*fresh.values(), **options)
                return y, fresh["keys"], fresh["values"]

            label = "b={} t={} heads={} kv={} d={} rot={} past={} capacity={}".format(*shape)
            label += "" if mask is None else " padded"
            want, bound = zip(*((r.value, r.error) for r in bounded), strict=True)
            yield Case("attention", "bound", label, None, run, want, bound)


def exact_attention_case(seed: int = 0) -> Case:
    """`ops.attention` where nothing rounds: keys are rows of +-1 at right angles, a query is one
    of them, its score 128 above all others, so it takes the mean of the 1 or 2 values under it."""
    rng = np.random.default_rng(seed)
    d, heads, kv, past, t = 64, 4, 2, 150, 100
    rows = 8 * reference.hadamard(np.eye(d, dtype=np.float32))
    which = np.full(past + t, d - 1)  # asked for by nobody, but
    which[:64], which[128:192] = np.arange(64), np.arange(64)  # once a block, in time or not
    keys = np.broadcast_to(rows[which], (1, kv, past + t, d)).copy()
    keys[:, :, past:] = 0
    values = rng.integers(-8, 9, keys.shape).astype(np.float32)
    split = np.zeros((1, t, 2 * (heads + kv), d), np.float32)
    split[0, :, : 2 * heads : 2] = rows[rng.integers(0, d - 1, (t, heads))]
    split[0, :, 1 : 2 * heads : 2] = rng.choice([0, 64], (t, heads, d))  # sigmoid: 1/2 or 1
    split[0, :, 2 * heads : 2 * heads + kv] = rows[which[past:], None]
    split[0, :, 2 * heads + kv :] = rng.integers(-8, 9, (t, kv, d))
    cos, sin = np.zeros((1, t, 16), np.float32), np.ones((1, t, 16), np.float32)  # quarter turns
    keys[..., :16] = np.concatenate([-keys[..., 8:16], keys[..., :8]], -1)
    norms = np.full(d, 16, np.float32), np.ones(d, np.float32)
    arrays = (split.reshape(1, t, -1), *norms, cos, sin, keys, values)
    options = {"heads": heads, "past": past, "eps": 0.0}

    def run() -> tuple[np.ndarray, ...]:
        fresh = [a.copy() for a in arrays]
        return ops.attention(*fresh, **options), *fresh[-2:]

    want = tuple(rounded(a, "f32") for a in reference.attention(*arrays, **options))
    return Case("attention", "exact", f"d={d} t={t} past={past}", None, run, want)


def rotations(rng, kind: str, hidden: int, inner: int) -> tuple[Rotation | None, Rotation | None]:
    """(hidden, inner) as formats have them: ``none``, ``blocks`` (TQ) or ``rows`` (JANGTQ)."""

    def signs(n: int) -> np.ndarray:
        return rng.choice(np.float32([-1, 1]), n)

    if kind == "none":
        return None, None
    if kind == "blocks":
        return Rotation(32, signs(32), signs(32)), Rotation(32, signs(32), signs(32))
    return Rotation(None, signs(hidden)), Rotation(None, signs(inner))


def parts_of(x: np.ndarray, weight: Weight) -> np.ndarray:
    """x through the weight's rotation and the weight, by the ops that do one each."""
    r = weight.rotation
    x = x if r is None else ops.hadamard(x, block=r.block, pre=r.pre, post=r.post)
    return ops.qmatmul(x, weight)


LINEAR, PLAIN = Instance("linear", 4, "f32"), Instance("plain", 32, "f32")


def block_weight(rng, rows: int, columns: int, rotation: Rotation | None, **more) -> Weight:
    """4-bit rows in groups of 32 that read an input of some width under a rotation."""
    padded = ops.rotated_columns(columns, rotation.block) if rotation else columns
    w = random_weight(rng, LINEAR, rows, padded, group=32, kind="gaussian", **more)
    return replace(w, rotation=rotation, in_features=columns)


def signs_of(rng, *shape: int) -> np.ndarray:
    """Rows of +-1: their RMSNorm with eps = 0 is the product with gamma, exactly."""
    return rng.choice(np.float32([-1, 1]), shape)


def attention_block_call(rng, kind: str, b=2, t=3, past=2, capacity=6) -> Callable:
    """run(fused, lend, module): the outputs of one `ops.attention_block`, or `hadamoe.mlx`'s."""
    hidden, heads, kv, d, rot = 64, 4, 2, 24, 8
    arrays = attention_arrays(rng, b, t, heads, kv, d, rot, past, capacity)
    del arrays["proj"]
    inner = heads * d
    turn, turn_inner = rotations(rng, kind, hidden, inner)
    weights = {
        "q": block_weight(rng, 2 * inner, hidden, turn),
        "k": block_weight(rng, kv * d, hidden, None),
        "v": block_weight(rng, kv * d, hidden, turn),
        "o": block_weight(rng, hidden, inner, turn_inner),
    }
    x, norm = signs_of(rng, b, t, hidden), rng.uniform(0.5, 1.5, hidden).astype(np.float32)
    mask = padding(rng, b, t, past, capacity)
    options = {"past": past, "eps": 0.0}
    packed = ops.AttentionWeights.of(**weights)

    def run(fused: bool, lend: Callable = np.array, module: Any = ops) -> tuple[Any, ...]:
        vectors = [lend(a) for a in arrays.values()]
        if fused:
            first = lend(x), lend(norm), packed
            y = module.attention_block(*first, *vectors, mask=lend(mask), **options)
            return y if isinstance(y, tuple) else (y, *vectors[-2:])
        proj = np.concatenate([parts_of(x * norm, weights[role]) for role in "qkv"], -1)
        y = ops.attention(proj, *vectors, heads=heads, mask=mask, **options)
        return x + parts_of(y, weights["o"]), *vectors[-2:]

    return run


def gated_delta_block_call(rng, kind: str, b=2, t=3) -> Callable:
    """run(fused, lend, module): the outputs of one `ops.gated_delta_block`."""
    hidden, hk, hv, dk, dv = 64, 2, 4, 16, 24
    arrays = gated_delta_arrays(rng, b, t, hk, hv, dk, dv, 4)
    del arrays["proj"]
    turn, turn_inner = rotations(rng, kind, hidden, hv * dv)
    weights = {
        "qkv": block_weight(rng, 2 * hk * dk + hv * dv, hidden, turn),
        "z": block_weight(rng, hv * dv, hidden, turn),
        "b": block_weight(rng, hv, hidden, None),
        "a": block_weight(rng, hv, hidden, None),
        "out": block_weight(rng, hidden, hv * dv, turn_inner),
    }
    x, norm = signs_of(rng, b, t, hidden), rng.uniform(0.5, 1.5, hidden).astype(np.float32)
    mask = np.arange(t) >= np.arange(b)[:, None]
    options = {"heads": (hk, hv), "head_dims": (dk, dv), "eps": 0.0}
    packed = ops.DeltaWeights.of(**weights)

    def run(fused: bool, lend: Callable = np.array, module: Any = ops) -> tuple[Any, ...]:
        vectors = [lend(a) for a in arrays.values()]
        if fused:
            first = lend(x), lend(norm), packed
            y = module.gated_delta_block(*first, *vectors, mask=lend(mask), **options)
            return y if isinstance(y, tuple) else (y, *vectors[-2:])
        normed = x * norm * mask[..., None].astype(np.float32)
        proj = [parts_of(normed, weights[role]) for role in ("qkv", "z", "b", "a")]
        y = ops.gated_delta(np.concatenate(proj, -1), *vectors, **options)
        return x + parts_of(y, weights["out"]), *vectors[-2:]

    return run


def moe_block_call(rng, kind: str, t=3) -> Callable:
    """run(fused, lend, module): the outputs of one `ops.moe_block`."""
    hidden, inner, experts = 64, 96, 5
    turn, turn_inner = rotations(rng, kind, hidden, inner)
    weights = {
        "router": block_weight(rng, experts, hidden, None),
        "gate_up": block_weight(rng, 2 * inner, hidden, turn, experts=experts),
        "down": block_weight(rng, hidden, inner, turn_inner, experts=experts),
        "shared_gate_up": block_weight(rng, 2 * inner, hidden, None),
        "shared_down": block_weight(rng, hidden, inner, None),
        "shared_gate": Weight(hidden, ((plain_part(rng.standard_normal((1, hidden))),),)),
    }
    moe = ops.MoeWeights.of(**weights)
    x, norm = signs_of(rng, t, hidden), rng.uniform(0.5, 1.5, hidden).astype(np.float32)

    def run(fused: bool, lend: Callable = np.array, module: Any = ops) -> tuple[Any, ...]:
        if fused:
            return (module.moe_block(lend(x), lend(norm), moe, top_k=2, eps=0.0),)
        return (x + ops.moe_decode(x * norm, moe, top_k=2),)

    return run


BLOCKS = {
    "attention_block": attention_block_call,
    "gated_delta_block": gated_delta_block_call,
    "moe_block": moe_block_call,
}


def block_cases(op: str, seed: int = 0) -> Iterator[Case]:
    """A fused op gives the bits of the ops it is made of, whose own claims say what they are: the
    difference must be 0."""
    rng = np.random.default_rng(seed)
    for kind in ("none", "blocks", "rows"):
        call = BLOCKS[op](rng, kind)

        def run(call=call) -> tuple[np.ndarray, ...]:
            return tuple(a - b for a, b in zip(call(True), call(False), strict=True))

        want = tuple(np.zeros_like(a) for a in call(True))
        yield Case(op, "exact", f"rotation={kind}", None, run, want)


def qmatmul_top_cases(seed: int = 0) -> Iterator[Case]:
    """`ops.qmatmul_top` exactly: integers with many equal results, in several pieces."""
    rng = np.random.default_rng(seed)
    for rows, top, tokens in ((20000, 50, 1), (513, 3, 1), (8193, 1, 9), (40, 40, 3), (1, 1, 2)):
        w = random_weight(rng, LINEAR, rows, 64, group=32)
        x = rng.integers(-4, 5, (tokens, 64)).astype(np.float32)
        want = reference.qmatmul_top(x, w, top)
        label = f"n={rows} top={top} t={tokens}"
        yield Case(
            "qmatmul_top", "exact", label, LINEAR, lambda a=(x, w, top): ops.qmatmul_top(*a), want
        )
    for kind in ("none", "blocks", "rows"):
        turn, _ = rotations(rng, kind, 64, 64)
        w = block_weight(rng, 300, 64, turn)
        x, norm = signs_of(rng, 2, 64), rng.uniform(0.5, 1.5, 64).astype(np.float32)

        def run(x=x, norm=norm, w=w) -> tuple[np.ndarray, ...]:
            values, index = ops.qmatmul_top(x, w, 7, norm=norm, eps=0.0)
            y = parts_of(x * norm, w)
            order = np.argsort(-y, -1, kind="stable")[:, :7]
            return values - np.take_along_axis(y, order, -1), index - order

        want = np.zeros((2, 7), np.float32), np.zeros((2, 7), np.int64)
        yield Case("qmatmul_top", "exact", f"rotation={kind}", LINEAR, run, want)
