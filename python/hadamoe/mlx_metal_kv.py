"""The quantized KV cache on MLX's Metal device, lazily."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np

from . import metal_kv
from .kv import KEY_SEED, PAGE, VALUE_SEED, page_bytes, signs
from .mlx_metal import dtype_name, run
from .reference_kv_peers import TURBO_CODEBOOKS

__all__ = ["kv_decode", "kv_encode", "kv_scores"]


@cache
def _signs(side: str, d: int) -> mx.array:
    return mx.array(signs(d, KEY_SEED if side == "key" else VALUE_SEED))


@cache
def _book(codec: str, d: int) -> mx.array | None:
    if not codec.startswith("turbo"):
        return None
    book = TURBO_CODEBOOKS[d, int(codec[-1])]
    return mx.array(np.pad(book, (0, 16 - len(book))))  # of one length, for one kernel signature


def kv_encode(rows: mx.array, codec: str, *, side: str, scale: float = 1.0) -> mx.array:
    """`mlx_kv.kv_encode` in one launch: ``[..., 64, d]`` to u8 ``[..., bytes]``."""
    *lead, _, d = rows.shape
    flat = rows.reshape(-1, PAGE, d)
    launch = metal_kv.encode(flat.shape[0], codec, side, d, scale)
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
    name = dtype_name(mx.zeros(0, dtype))
    launch = metal_kv.decode(flat.shape[0], codec, side, d, name, scale)
    arrays = {"pages": flat, "signs": _signs(side, d), "book": _book(codec, d)}
    (rows,) = run(launch, arrays)
    return rows.reshape(*lead, PAGE, d)


def kv_scores(q: mx.array, pages: mx.array, codec: str) -> tuple[mx.array, mx.array, mx.array]:
    """`kv_ops.kv_scores`: q8 i8 ``[r, d]``, unit f32 ``[r]``, scores i32 ``[r, 64 p]``."""
    launch = metal_kv.scores(q.shape[0], pages.shape[0], codec, q.shape[1])
    return tuple(run(launch, {"q": q, "pages": pages, "signs": _signs("key", q.shape[1])}))
