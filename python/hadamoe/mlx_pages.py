"""Keys or values of one layer of a quantized cache as MLX arrays that grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from .kv import PAGE, page_bytes
from .mlx_kv import kv_decode, kv_encode


class Side:
    """Keys or values of a layer: page 0 and the newest pages as they came, full others as bytes.

    Attributes:
        first: ``[b, g, <= 64, d]``, page 0.
        pages: u8 ``[b, g, p, bytes]``: every full page but page 0.
        newest: ``[b, g, n, d]``, the tokens from the cache's page ``kept`` on.
    """

    def __init__(self, codec: str, side: str, arrays: Sequence[mx.array]) -> None:
        self.codec, self.side = codec, side
        self.first, self.pages, self.newest = arrays

    @classmethod
    def empty(cls, codec: str, side: str, like: mx.array) -> Side:
        b, g, _, d = like.shape
        none = mx.zeros((b, g, 0, d), like.dtype)
        return cls(codec, side, [none, mx.zeros((b, g, 0, page_bytes(codec, d)), mx.uint8), none])

    @property
    def arrays(self) -> list[mx.array]:
        return [self.first, self.pages, self.newest]

    def seen(self, offset: int, kept: int) -> list[mx.array]:
        """``[b, g, tokens, d]`` side by side: all tokens as the next one sees them."""
        b, g, p, _ = self.pages.shape
        d, parts = self.first.shape[-1], [self.first]
        if p:
            rows = kv_decode(self.pages, self.codec, d, side=self.side, dtype=self.first.dtype)
            parts.append(rows.reshape(b, g, p * PAGE, d))
        return [*parts, self.newest[:, :, (max(1, offset // PAGE) - kept) * PAGE :]]

    def append(self, x: mx.array, offset: int, kept: int, keep: int) -> None:
        b, g, t, d = x.shape
        if offset < PAGE:
            self.first = mx.concatenate([self.first, _cut(x, 0, PAGE - offset)], 2)
        newest = mx.concatenate([self.newest, x[:, :, max(0, PAGE - offset) :]], 2)
        begin, end = max(1, offset // PAGE), (offset + t) // PAGE
        if begin < end:
            full = newest[:, :, (begin - kept) * PAGE : (end - kept) * PAGE]
            self.store(full.reshape(b, g, end - begin, PAGE, d))
        self.newest = _cut(newest, (keep - kept) * PAGE, newest.shape[2])

    def store(self, rows: mx.array) -> None:
        """Pages ``[b, g, p, 64, d]`` behind those that are there."""
        self.pages = mx.concatenate([self.pages, kv_encode(rows, self.codec, side=self.side)], 2)

    def slots(self, kept: int) -> mx.array:
        """``[b, g, 3 * 64, d]``: page 0, then page p from row 64 (1 + p % 2) on."""
        b, g, n, d = self.first.shape
        raw = mx.zeros((b, g, 3 * PAGE, d), self.first.dtype)
        raw[:, :, :n] = self.first
        for i in range(0, self.newest.shape[2], PAGE):
            x, row = self.newest[:, :, i : i + PAGE], slot(kept + i // PAGE)
            raw[:, :, row : row + x.shape[2]] = x
        return raw

    def take(self, raw: mx.array, offset: int, kept: int) -> None:
        """`slots` back to page 0 and the newest pages."""
        self.first = _cut(raw, 0, min(PAGE, offset))
        rows = [raw[:, :, slot(p) : slot(p) + PAGE] for p in (kept, kept + 1)]
        self.newest = _cut(mx.concatenate(rows, 2), 0, max(0, offset - kept * PAGE))

    def trim(self, offset: int, kept: int) -> None:
        self.first = _cut(self.first, 0, offset)
        self.pages = _cut(self.pages, 0, max(0, offset // PAGE - 1))
        self.newest = _cut(self.newest, 0, max(0, offset - kept * PAGE))


def slot(page: Any) -> Any:
    """The first row of a page from 1 on in `Side.slots`."""
    return (1 + page % 2) * PAGE


def _cut(x: mx.array, begin: int, end: int) -> mx.array:
    """Tokens begin .. end of ``[b, g, t, d]``, without holding the memory of the others."""
    whole = begin == 0 and end >= x.shape[2]
    return x if whole else mx.contiguous(x[:, :, begin:end])
