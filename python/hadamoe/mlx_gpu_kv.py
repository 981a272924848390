"""The quantized KV cache on MLX's GPU, lazily."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from .gpu_calls import dtype_name
from .kv import KEY_SEED, PAGE, VALUE_SEED, KVFormat, page_bytes, signs
from .mlx_gpu import front, run
from .reference_kv_peers import TURBO_CODEBOOKS

__all__ = ["Prepared", "attend", "kv_decode", "kv_encode", "kv_scores", "prepare"]


def _plans() -> Any:
    return front().plans.kv


@cache
def _signs(side: str, d: int) -> mx.array:
    return mx.array(signs(d, KEY_SEED if side == "key" else VALUE_SEED))


@cache
def _book(codec: str, d: int) -> mx.array | None:
    if not codec.startswith("turbo"):
        return None
    book = TURBO_CODEBOOKS[d, int(codec[-1])]
    return mx.array(np.pad(book, (0, 16 - len(book))))  # of one length, for one kernel signature


@cache
def _books(form: KVFormat, d: int) -> mx.array:
    return mx.concatenate([b if (b := _book(c, d)) is not None else mx.zeros(16) for c in form])


def kv_encode(rows: mx.array, codec: str, *, side: str, scale: float = 1.0) -> mx.array:
    """`mlx_kv.kv_encode` in one launch: ``[..., 64, d]`` to u8 ``[..., bytes]``."""
    *lead, _, d = rows.shape
    flat = rows.reshape(-1, PAGE, d)
    launch = _plans().encode(flat.shape[0], codec, side, d, scale, dtype_name(rows.dtype))
    arrays = {"rows": flat, "signs": _signs(side, d), "book": _book(codec, d)}
    (pages,) = run(launch, arrays)
    return pages.reshape(*lead, page_bytes(codec, d))


def kv_decode(
    pages: mx.array,
    codec: str,
    head_dim: int,
    *,
    side: str,
    dtype: mx.Dtype = mx.float32,
    scale: float = 1.0,
) -> mx.array:
    """`mlx_kv.kv_decode` in one launch: u8 ``[..., bytes]`` to ``[..., 64, head_dim]``."""
    lead, d = pages.shape[:-1], head_dim
    flat = pages.reshape(-1, pages.shape[-1])
    name = dtype_name(dtype)
    launch = _plans().decode(flat.shape[0], codec, side, d, name, scale)
    arrays = {"pages": flat, "signs": _signs(side, d), "book": _book(codec, d)}
    (rows,) = run(launch, arrays)
    return rows.reshape(*lead, PAGE, d)


def kv_scores(q: mx.array, pages: mx.array, codec: str) -> tuple[mx.array, mx.array, mx.array]:
    """`kv_ops.kv_scores`: q8 i8 ``[r, d]``, unit f32 ``[r]``, scores i32 ``[r, 64 p]``."""
    launch = _plans().scores(q.shape[0], pages.shape[0], codec, q.shape[1])
    return tuple(run(launch, {"q": q, "pages": pages, "signs": _signs("key", q.shape[1])}))


class Prepared(NamedTuple):
    """Queries, keys and values of tokens, positions applied.

    Attributes:
        q: ``[b, h, t, d]``.
        kv: keys and values ``[2, b, g, t, d]``.
        x, factors: queries as coded pages' scores take them, or None.
    """

    q: mx.array
    kv: mx.array
    x: mx.array | None = None
    factors: mx.array | None = None


def prepare(
    proj: mx.array,
    heads: tuple[int, int],
    head_dim: int,
    norms: tuple[mx.array, mx.array] | None,
    freqs: mx.array | None,
    offset: int | mx.array,
    *,
    eps: float = 1e-6,
    stretch: float = 1.0,
    form: KVFormat | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
    q_dtype: mx.Dtype = mx.float32,
    kv_dtype: mx.Dtype = mx.float32,
) -> Prepared:
    """What is between attention's projections and its cache, in one launch.

    Args:
        proj: ``[b, t, (2 h + 2 g) d]``: query and gate of each head, keys, values.
        heads: of queries, of keys.
        norms: f32 ``[d]`` of queries and of keys; None for none.
        freqs: f32 ``[rot / 2]``, radians a position; None: positions turn nothing.
        offset: positions of the first tokens: one, or i32 ``[b]``.
        stretch: what YaRN multiplies cosines and sines with.
        form: codecs of the cache; None for one without.
        scales: of fp8 keys and values.
    """
    b, t, _ = proj.shape
    sizes = _plans().Heads(b, *heads, head_dim, form, scales)
    rot = 0 if freqs is None else 2 * freqs.shape[0]
    dtypes = {"q_dtype": dtype_name(q_dtype), "kv_dtype": dtype_name(kv_dtype)}
    launch = _plans().prepare(
        sizes, t, rot, **dtypes, eps=None if norms is None else eps, stretch=stretch
    )
    arrays = dict(zip(("q_norm", "k_norm"), norms or (), strict=False))
    arrays |= {"proj": proj, "freqs": freqs, "dims": [t]}
    arrays |= {"offsets": _per_sequence(offset, b), "signs": _signs("key", head_dim)}
    made = run(launch, arrays)
    return Prepared(*made[: 2 if form is None else 4])


def _per_sequence(number: int | mx.array, batch: int) -> list[int] | mx.array:
    if isinstance(number, int):
        return [number] * batch
    return mx.broadcast_to(number.astype(mx.int32).reshape(-1), (batch,))


def attend(
    tokens: Prepared,
    raw: mx.array,
    pages: Sequence[mx.array],
    length: int | mx.array,
    form: KVFormat,
    *,
    skip: int = 1,
    table: mx.array | None = None,
    gate: mx.array | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
    dtype: mx.Dtype = mx.float32,
) -> mx.array:
    """Attention of one token of each sequence over a quantized cache, in two launches.

    As `kv_ops.kv_attend`: page 0 and the token's own page as they came, others as stored.

    Args:
        tokens: of `prepare` with ``form``; keys and values are in ``raw`` already.
        raw: ``[2, b, g, 192, d]``: page 0, then page p from row 64 (1 + p % 2) on.
        pages: of keys, of values, u8 ``[b, g, m, bytes]``: page p at p - skip.
        table: i32 ``[b, m]``: places of these pages, where ``pages`` are u8 ``[places, g, bytes]``.
        length: tokens of each sequence with this one: one number or i32 ``[b]``, of which ``m``
            pages are enough.
        scales: of fp8 keys and values, as in `prepare`.
        gate: ``[b, 1, (2 h + 2 g) d]``, the projection; the result is times sigmoid of its gates.

    Returns:
        ``[b, 1, h d]`` of ``dtype``.
    """
    b, h, _, d = tokens.q.shape
    kv = _plans()
    heads = kv.Heads(b, h, raw.shape[2], d, form, scales)
    m = pages[0].shape[2] if table is None else table.shape[1]
    runs = -(-(m + skip) // 8) if m else 0  # of 8 pages
    arrays = {"q": tokens.q, "x": tokens.x, "factors": tokens.factors, "raw": raw, "gate": gate}
    arrays |= {"key_pages": pages[0], "value_pages": pages[1], "table": table}
    arrays |= {"fixed_keys": pages[0], "fixed_values": pages[1]}  # CUDA's; dims are Metal's
    arrays |= {"key_signs": _signs("key", d), "value_signs": _signs("value", d)}
    arrays |= {"signs": arrays["value_signs"], "book": _books(form, d)}
    arrays |= {"lengths": _per_sequence(length, b), "dims": [m, runs]}
    launches = kv.attend(
        heads, m, skip, dtype_name(dtype), dtype_name(raw.dtype),
        table=table is not None, gate=0 if gate is None else gate.shape[-1],
    )  # fmt: skip
    for launch in launches:
        made = run(launch, arrays)
        arrays |= {out.name: a for out, a in zip(launch.outputs, made, strict=True)}
    return arrays["y"].reshape(b, 1, h * d)
