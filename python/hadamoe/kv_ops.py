"""The ops of the quantized KV cache, on numpy arrays and, for attention, torch tensors too.

A page is 64 tokens of one head and one side; `hadamoe.kv` lists the codecs, `hadamoe.reference_kv`
says in numpy what they and attention mean, ``csrc/core/kv_codecs.h`` how bytes lie in a page.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import _cpu
from .errors import ContractError
from .kv import CODECS, KEY_SEED, PAGE, VALUE_SEED, KVFormat, page_bytes, signs
from .roles import AttentionWeights

__all__ = ["KVLayer", "kv_attend", "kv_attention_block", "kv_decode", "kv_encode", "kv_scores"]

_SIDES = {"key": 0, "value": 1}


class KVLayer(NamedTuple):
    """What attention of one layer reads and writes, for b sequences.

    Attributes:
        format: codecs of keys and values.
        raw_keys, raw_values: f32, f16 or bf16 (numpy: uint16, the bits of bf16)
            ``[b, g, 3, 64, d]``. Slot 0 holds page 0 for good, slot 1 + p % 2 page p: the newest
            and the one before it.
        key_pages, value_pages: u8 ``[pages, g, bytes]``.
        table: i32 ``[b, m]``: where page p of a sequence is in key_pages and value_pages; -1: not
            (page 0, the open page, pages a window has left behind).
        window: pages before its own that a query sees beside page 0; 0 for all.
        vectors: f32 ``[4, g, d]``: key mean, key balance, value mean, value balance, or None.
            Codecs ``h*`` store (x - mean) * balance.
        scales: f32 ``[2]``: of fp8 keys and values, or None for 1.
    """

    format: KVFormat
    raw_keys: Any
    raw_values: Any
    key_pages: Any
    value_pages: Any
    table: Any
    window: int = 0
    vectors: Any = None
    scales: Any = None

    @property
    def inputs(self) -> list[Any]:
        """Arrays that ops read: table, signs of keys and values, vectors, scales."""
        d = self.raw_keys.shape[-1]
        return [self.table, signs(d, KEY_SEED), signs(d, VALUE_SEED), self.vectors, self.scales]

    @property
    def outputs(self) -> list[Any]:
        """Arrays that ops write."""
        return [self.raw_keys, self.raw_values, self.key_pages, self.value_pages]

    @property
    def ints(self) -> list[int]:
        """Codecs and window."""
        return [*(CODECS[c] for c in self.format), self.window]


def kv_attend(q: Any, k: Any, v: Any, layer: KVLayer, lengths: Any, counts: Any = None) -> Any:
    """Appends keys and values to a layer's cache, then attends: softmax(q k^T / sqrt(d)) v, causal.

    A query in page p of its sequence sees page 0 and its own page as they are, pages between as
    stored; so its bits depend on neither how the tokens came in nor the batch. A page is stored
    when it is full: ``layer.table`` must have a place for every page that this call fills.

    Args:
        q: ``[b, t, h, d]`` f32, f16 or bf16, positions applied; None: append only.
        k, v: ``[b, t, g, d]`` of q's dtype; None: the tokens are in the cache already, in its last
            two pages.
        lengths: i64 ``[b]``: tokens in each sequence before this call (k None: with them).
        counts: i64 ``[b]``: how many of the t tokens are real, the last ones; None for all.

    Returns:
        ``[b, t, h, d]`` of q's dtype, 0 for tokens that are not real; None without q.
    """
    x = q if q is not None else k
    lengths = np.ascontiguousarray(lengths, np.int64)
    counts = np.full(x.shape[0], x.shape[1]) if counts is None else counts
    counts = np.ascontiguousarray(counts, np.int64)
    y = None if q is None else _empty_like(q)
    inputs = [q, k, v, lengths, counts, *layer.inputs]
    _cpu.call("kv_attend", inputs, [y, *layer.outputs], layer.ints, [])
    return y


def kv_attention_block(
    x: Any,
    norm: Any,
    weights: AttentionWeights,
    q_norm: Any,
    k_norm: Any,
    cos: Any,
    sin: Any,
    layer: KVLayer,
    lengths: Any,
    counts: Any,
    *,
    eps: float = 1e-6,
) -> Any:
    """``x + o(attention(q, k, v of rmsnorm(x)))`` over pages.

    Args:
        x: f32 ``[b, t, hidden]``, the residual stream; norm, weights, q_norm, k_norm, cos, sin, eps
            as in `ops.attention_block`; layer, lengths, counts as in `kv_attend`.

    Returns:
        f32 ``[b, t, hidden]``; x + o(0) for tokens that are not real.
    """
    y = _empty_like(x)
    signs_, tables, ints = weights.arguments(0)
    fixed = [norm, *signs_, q_norm, k_norm, *tables, *weights.buffers]
    places = [np.ascontiguousarray(a, np.int64) for a in (lengths, counts)]
    inputs = [x, cos, sin, *places, *layer.inputs, *fixed]
    outputs = [y, *layer.outputs]
    _cpu.call("kv_attention_block", inputs, outputs, [*layer.ints, *ints[1:]], [eps])
    return y


def _empty_like(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return np.empty(x.shape, x.dtype)
    if not hasattr(x, "new_empty"):
        raise ContractError(f"kv: q is {type(x).__name__}, needs a numpy or torch array")
    return x.new_empty(x.shape)


def _side(side: str, codec: str, d: int, vectors: Any, scale: float) -> tuple[list[Any], list[int]]:
    if side not in _SIDES or codec not in CODECS:
        raise ContractError(
            f"kv: side={side!r} codec={codec!r}, needs one of {', '.join(_SIDES)} and of "
            f"{', '.join(CODECS)}"
        )
    seed = (KEY_SEED, VALUE_SEED)[_SIDES[side]]
    pair = [None, None] if vectors is None else list(vectors)
    return [signs(d, seed), *pair, np.float32([scale])], [CODECS[codec], _SIDES[side]]


def kv_encode(
    rows: np.ndarray, codec: str, *, side: str = "key", vectors: Any = None, scale: float = 1.0
) -> np.ndarray:
    """Whole pages of one head as a cache stores them.

    Args:
        rows: f32 ``[p, 64, d]``.
        side: "key" or "value": their rotations differ, and what kivi groups.
        vectors: (mean, balance) f32 ``[d]`` each, or None.
        scale: of fp8.

    Returns:
        u8 ``[p, bytes]``.

    Raises:
        ContractError: a number that is not finite, or a shape the codec cannot store.
    """
    p, _, d = rows.shape
    y = np.empty((p, page_bytes(codec, d)), np.uint8)
    inputs, ints = _side(side, codec, d, vectors, scale)
    _cpu.call("kv_encode", [np.ascontiguousarray(rows, np.float32), *inputs], [y], ints, [])
    return y


def kv_decode(
    pages: np.ndarray,
    codec: str,
    head_dim: int,
    *,
    side: str = "key",
    vectors: Any = None,
    scale: float = 1.0,
) -> np.ndarray:
    """What pages of `kv_encode` stand for, rotation undone: f32 ``[p, 64, head_dim]``."""
    y = np.empty((len(pages), PAGE, head_dim), np.float32)
    inputs, ints = _side(side, codec, head_dim, vectors, scale)
    _cpu.call("kv_decode", [np.ascontiguousarray(pages), *inputs], [y], ints, [])
    return y


def kv_scores(
    q: np.ndarray, pages: np.ndarray, codec: str, *, vectors: Any = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The integers behind the scores of an ``h*`` codec: the same on every machine.

    Args:
        q: f32 ``[r, d]``.
        pages: u8 ``[p, bytes]`` of `kv_encode`.

    Returns:
        q8 i8 ``[r, d]`` (the rotated query over its unit, rounded to even), unit f32 ``[r]``,
        scores i32 ``[r, 64 p]`` = q8 . integer codes of each token.
    """
    r, d = q.shape
    q8, unit = np.empty((r, d), np.int8), np.empty(r, np.float32)
    scores = np.empty((r, len(pages) * PAGE), np.int32)
    inputs, ints = _side("key", codec, d, vectors, 1.0)
    outputs = [q8, unit, scores]
    _cpu.call("kv_scores", [np.ascontiguousarray(q), pages, *inputs[:-1]], outputs, ints[:1], [])
    return q8, unit, scores
