"""The cases of the quantized cache's ops: codes bit for bit, attention within its bound."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .. import kv_ops, ops, reference_kv
from ..bf16 import to_bf16
from ..kv import CODECS, PAGE, KVFormat, page_bytes
from . import kv_rounding, layers
from .claims import UNIT, Case

#: Ours: codes are compared bit for bit.
OURS = ("h2", "h3", "h4", "h8")
#: Kinds of rows that break other codecs, then plain ones.
ROWS = ("gaussian", "heavy", "edges")


def rows_of(rng: np.random.Generator, kind: str, pages: int, d: int) -> np.ndarray:
    """f32 ``[pages, 64, d]``: Gaussian, heavy tails with outlying columns, or edge cases."""
    x = rng.standard_normal((pages, PAGE, d))
    if kind == "heavy":
        x = rng.standard_t(3, x.shape)
        x[..., rng.integers(0, d, 4)] *= 20
    x = x.astype(np.float32)
    if kind == "edges":
        x[:, 0] = 0
        x[:, 1:9] = 0
        x[:, np.arange(1, 9), rng.integers(0, d, 8)] = np.float32(rng.choice([-3, 0.5], 8))
        x[:, 9], x[:, 10], x[:, 11] = 1.5, 1e4, -1e9
        x[:, 12] *= np.float32(1e-9)
        x[:, 13] *= np.float32(1e-30)
        x[:, 14] *= np.float32(1e4)
        x[:, 15] *= np.float32(1e9)
    return x


def vectors_of(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """f32 ``[2, *shape]``: a mean and a balance."""
    mean = rng.standard_normal(shape)
    return np.float32([mean, np.exp(0.7 * rng.standard_normal(shape))])


def codec_cases(codec: str, seed: int = 0) -> Iterator[Case]:
    """`kv_encode`, `kv_decode` and `kv_scores` of one codec of ours, bit for bit."""
    rng = np.random.default_rng([seed, CODECS[codec]])
    for i, d in enumerate((32, 64, 128, 256, 512)):
        for kind in ROWS:
            side, pair = ("key", "value")[i % 2], vectors_of(rng, d) if kind == "heavy" else None
            x = rows_of(rng, kind, 2, d)
            options: dict[str, Any] = {"side": side, "vectors": pair}
            pages = reference_kv.kv_encode(x, codec, **options)
            run = partial(kv_ops.kv_encode, x, codec, **options)
            label = f"{codec} d={d} {side} {kind}"
            yield Case("kv_encode", "exact", label, None, lambda run=run: (run(),), (pages,))
            codes = rng.integers(0, 256, pages.shape, dtype=np.uint8)  # all codes in all places
            codes[:, codes.shape[1] - 2 * PAGE :] = pages[:, codes.shape[1] - 2 * PAGE :]
            want = reference_kv.kv_decode(codes, codec, d, **options)
            run = partial(kv_ops.kv_decode, codes, codec, d, **options)
            yield Case("kv_decode", "exact", label, None, lambda run=run: (run(),), (want,))
            q = rows_of(rng, kind, 1, d)[0, : 5 + 9 * i]
            keys = codes if i % 2 else reference_kv.kv_encode(x, codec, vectors=pair)
            run = partial(kv_ops.kv_scores, q, keys, codec, vectors=pair)
            want = reference_kv.kv_scores(q, keys, codec, vectors=pair)
            yield Case("kv_scores", "exact", f"{codec} d={d} {kind}", None, run, want)


class Shape(NamedTuple):
    """Sequences of `past` tokens each, then `counts` more in a call of t tokens."""

    heads: int
    groups: int
    d: int
    past: tuple[int, ...]
    t: int
    counts: tuple[int, ...] | None = None
    window: int = 0
    vectors: bool = False
    dtype: str = "f32"
    raw: str = "f32"


#: One query and many; heads that fill no register; pages that fill in this call; padding; a window.
SHAPES = (
    Shape(16, 2, 64, (1024,), 1),
    Shape(3, 3, 32, (200, 0, 63), 4, (4, 3, 2)),
    Shape(8, 1, 128, (190,), 70, vectors=True, raw="bf16"),
    Shape(5, 1, 64, (700, 129), 3, window=2, raw="f16"),
)
_STORED = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}


def stored(x: np.ndarray, dtype: str) -> np.ndarray:
    """f32 numbers as an op takes them; bf16 as its bits."""
    return to_bf16(x) if dtype == "bf16" else x.astype(_STORED[dtype])


def layer_of(rng: np.random.Generator, fmt: KVFormat, shape: Shape, most: int) -> kv_ops.KVLayer:
    """An empty cache for ``most`` tokens: pages in random places, what nobody wrote is 0xFF."""
    b, g, d = len(shape.past), shape.groups, shape.d
    m = most // PAGE + 1
    raw = [np.empty((b, g, 3, PAGE, d), _STORED[shape.raw]) for _ in range(2)]
    pages = [np.empty((b * m + 3, g, page_bytes(codec, d)), np.uint8) for codec in fmt]
    for array in (*raw, *pages):
        array.view(np.uint8)[...] = 0xFF
    table = rng.permutation(b * m + 3)[: b * m].reshape(b, m).astype(np.int32)
    table[:, 0] = -1
    vectors = None
    if shape.vectors:
        vectors = np.concatenate([vectors_of(rng, g, d), vectors_of(rng, g, d)])
    scales = np.float32([0.25, 0.5]) if "fp8" in fmt else None
    return kv_ops.KVLayer(fmt, *raw, *pages, table, shape.window, vectors, scales)


def tokens(rng: np.random.Generator, shape: Shape, t: int) -> tuple[np.ndarray, ...]:
    """Random q, k, v of t tokens; queries that look at few keys, keys with a common part."""
    b, d = len(shape.past), shape.d
    q = 2 * rng.standard_normal((b, t, shape.heads, d))
    k = rng.standard_normal((b, t, shape.groups, d)) + 0.5
    v = rng.standard_normal((b, t, shape.groups, d)) + 0.3
    return tuple(stored(a.astype(np.float32), shape.dtype) for a in (q, k, v))


def filled(rng: np.random.Generator, fmt: KVFormat, shape: Shape, more: int = 0) -> kv_ops.KVLayer:
    """A cache that holds the shape's past tokens, room for ``more``."""
    layer, most = layer_of(rng, fmt, shape, max(shape.past) + more), max(shape.past)
    _, k, v = tokens(rng, shape, most)
    k, v = (a.astype(np.float32) if a.dtype != np.uint16 else a for a in (k, v))
    past = [0] * len(shape.past)
    return reference_kv.kv_attend(None, k, v, layer, past, shape.past)[1] if most else layer


def live(layer: kv_ops.KVLayer, lengths: np.ndarray) -> tuple[np.ndarray, ...]:
    """The layer's arrays with raw rows zeroed that stand for no token of the last two pages."""
    raw = []
    for a in (layer.raw_keys, layer.raw_values):
        a = a.copy()
        for i, n in enumerate(lengths):
            newest = max(n - 1, 0) // PAGE
            for slot in range(3):
                pages = [p for p in (0, newest - 1, newest) if p >= 0]
                held = [p for p in pages if reference_kv.slot_of(p) == slot]
                rows = min(n - held[-1] * PAGE, PAGE) if held else 0
                a[i, :, slot, max(rows, 0) :] = 0
        raw.append(a)
    return (*raw, layer.key_pages, layer.value_pages)


def attend_case(rng: np.random.Generator, fmt: KVFormat, shape: Shape) -> Case:
    """`kv_attend`: y within its bound, the cache after it bit for bit."""
    layer, t = filled(rng, fmt, shape, shape.t), shape.t
    q, k, v = tokens(rng, shape, t)
    y, after = kv_rounding.kv_attend(q, k, v, layer, shape.past, shape.counts)
    lengths = np.array(shape.past) + (t if shape.counts is None else np.array(shape.counts))

    def run() -> tuple[np.ndarray, ...]:
        fresh = reference_kv.copied(layer)
        out = kv_ops.kv_attend(q, k, v, fresh, shape.past, shape.counts)
        return reference_kv.widen(out), *map(_widen, live(fresh, lengths))

    want = (y.value, *map(_widen, live(after, lengths)))
    error = y.error
    if shape.dtype != "f32":
        error = error + UNIT[shape.dtype] * (np.abs(y.value) + error + 2.0**-14)
    label = f"{'/'.join(fmt)} " + " ".join(
        f"{n}={x}" for n, x in zip(shape._fields, shape, strict=True)
    )
    bound = (error, *(np.zeros(a.shape) for a in want[1:]))
    return Case("kv_attend", "bound", label, None, run, want, bound)


def _widen(a: np.ndarray) -> np.ndarray:
    return a if a.dtype == np.uint8 else reference_kv.widen(a)


def attend_cases(seed: int = 0) -> Iterator[Case]:
    """Every codec of ours as keys and as values, and of others once, through every shape."""
    rng = np.random.default_rng(seed)
    pairs = [("h8", "h2"), ("h4", "h3"), ("h3", "h4"), ("h2", "h8")]
    for shape, pair in zip(SHAPES, pairs, strict=True):
        yield attend_case(rng, KVFormat(*pair), shape)
    for codec in CODECS:
        if codec not in OURS:
            shape = Shape(4, 2, 64, (130,), 2, dtype="f16")
            yield attend_case(rng, KVFormat(codec, codec), shape)


def _prepared(x: np.ndarray, norm: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Heads ``[b, t, n, d]`` normed and turned, the bits that `ops.attention` keeps as keys."""
    b, t, n, d = x.shape
    proj = np.zeros((b, t, 4 * n, d), np.float32)
    proj[:, :, 2 * n : 3 * n] = x
    keys, values = (np.zeros((b, n, t, d), np.float32) for _ in range(2))
    proj = proj.reshape(b, t, -1)
    ops.attention(proj, norm, norm, cos, sin, keys, values, heads=n, eps=0.0)
    return np.ascontiguousarray(keys.swapaxes(1, 2))


def _gated(y: np.ndarray, gate: np.ndarray) -> np.ndarray:
    """y sigmoid(gate) of ``[b, t, n, d]``, the bits of `ops.attention` of one key each."""
    b, t, n, d = y.shape
    proj = np.zeros((b * t, 1, 4 * n, d), np.float32)
    proj[:, 0, 1 : 2 * n : 2] = gate.reshape(b * t, n, d)
    proj[:, 0, 3 * n :] = y.reshape(b * t, n, d)
    caches = [np.zeros((b * t, n, 1, d), np.float32) for _ in range(2)]
    none, one = np.zeros((b * t, 1, 0), np.float32), np.ones(d, np.float32)
    out = ops.attention(proj.reshape(b * t, 1, -1), one, one, none, none, *caches, heads=n)
    return out.reshape(b, t, n * d)


def block_case(rng: np.random.Generator, fmt: KVFormat, shape: Shape, kind: str) -> Case:
    """`kv_attention_block` gives the bits of the ops it is made of."""
    b, t, h, g, d, hidden = len(shape.past), shape.t, shape.heads, shape.groups, shape.d, 64
    layer = filled(rng, fmt, shape, t)
    turn, turn_inner = layers.rotations(rng, kind, hidden, h * d)
    rows = {"q": 2 * h * d, "k": g * d, "v": g * d}
    weights = {role: layers.block_weight(rng, n, hidden, turn) for role, n in rows.items()}
    weights["o"] = layers.block_weight(rng, hidden, h * d, turn_inner)
    packed = ops.AttentionWeights.of(**weights)
    x = layers.signs_of(rng, b, t, hidden)
    arrays = layers.attention_arrays(rng, b, t, h, g, d, 8, 0, 1)
    q_norm, k_norm, cos, sin = (arrays[n] for n in ("q_norm", "k_norm", "cos", "sin"))
    norm = rng.uniform(0.5, 1.5, hidden).astype(np.float32)
    past, counts = (np.array(n, np.int64) for n in (shape.past, shape.counts or [t] * b))
    lengths = past + counts

    def fused() -> tuple[np.ndarray, ...]:
        after = reference_kv.copied(layer)
        vectors = (q_norm, k_norm, cos, sin, after, past, counts)
        y = kv_ops.kv_attention_block(x, norm, packed, *vectors, eps=0.0)
        return y, *map(_widen, live(after, lengths))

    def parts() -> tuple[np.ndarray, ...]:
        after = reference_kv.copied(layer)
        both, k, v = (layers.parts_of(x * norm, weights[role]) for role in "qkv")
        q, gate = np.split(both.reshape(b, t, h, 2 * d), 2, -1)
        q, k = _prepared(q, q_norm, cos, sin), _prepared(k.reshape(b, t, g, d), k_norm, cos, sin)
        y = kv_ops.kv_attend(q, k, v.reshape(b, t, g, d), after, past, counts)
        y = x + layers.parts_of(_gated(y, gate), weights["o"])
        return y, *map(_widen, live(after, lengths))

    def run() -> tuple[np.ndarray, ...]:
        pairs = zip(fused(), parts(), strict=True)
        return tuple(a.astype(np.float32) - b.astype(np.float32) for a, b in pairs)

    want = tuple(np.zeros_like(a, np.float32) for a in (x, *live(layer, past)))
    label = f"{'/'.join(fmt)} past={shape.past} t={t} rotation={kind}"
    return Case("kv_attention_block", "exact", label, None, run, want)


def block_cases(seed: int = 0) -> Iterator[Case]:
    """`kv_attention_block` under every kind of rotation, one token and many."""
    rng = np.random.default_rng(seed)
    yield block_case(rng, KVFormat("h4", "h3"), Shape(4, 2, 32, (200, 63), 1), "none")
    shape = Shape(4, 1, 64, (130, 0), 70, (70, 66), raw="bf16", vectors=True)
    yield block_case(rng, KVFormat("h8", "h4"), shape, "blocks")
    yield block_case(rng, KVFormat("turbo4", "fp8"), Shape(2, 2, 64, (190,), 3), "rows")


def cases(seed: int = 0) -> Iterator[tuple[str, list[Case]]]:
    """(op, its cases) of all five ops."""
    every = [c for codec in OURS for c in codec_cases(codec, seed)]
    for op in ("kv_encode", "kv_decode", "kv_scores"):
        yield op, [c for c in every if c.op == op]
    yield "kv_attend", list(attend_cases(seed))
    yield "kv_attention_block", list(block_cases(seed))
