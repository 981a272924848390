"""Keys and values of one layer of a quantized cache as MLX arrays that grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from . import mlx_gpu_kv
from .kv import PAGE, KVFormat, page_bytes
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


class Joint:
    """Sequences' sides side by side while one token comes to each: pages in a pool behind a table.

    The sides are empty until `part` gives all back.

    Args:
        sides: keys and values of each sequence.
        kept: of each sequence, as `Side.slots` takes it.
    """

    def __init__(self, sides: Sequence[Sequence[Side]], kept: Sequence[int]) -> None:
        self.sides = sides
        raw = [mx.stack([s.slots(k) for s in both]) for both, k in zip(sides, kept, strict=True)]
        self.raw = mx.concatenate(raw, 1)
        self.places: list[list[int]] = []  # of each sequence's pages from 1 on
        self.used = 0
        for both in sides:
            count = both[0].pages.shape[2]
            self.places.append(list(range(self.used, self.used + count)))
            self.used += count
        self.pool = []
        for column in zip(*sides, strict=True):
            pages = [side.pages[0].swapaxes(0, 1) for side in column]
            self.pool.append(_grown(mx.concatenate(pages)))
            for side in column:
                side.first = side.pages = side.newest = None
        self._table: mx.array | None = None

    @property
    def table(self) -> mx.array:
        """i32 ``[b, m]``."""
        if self._table is None:
            m = max(map(len, self.places))
            rows = [places + [0] * (m - len(places)) for places in self.places]
            self._table = mx.array(rows, mx.int32).reshape(len(rows), m)
        return self._table

    def attend(
        self,
        tokens: mlx_gpu_kv.Prepared,
        offsets: Sequence[int],
        form: KVFormat,
        gate: mx.array | None,
    ) -> mx.array:
        """Stores a token behind each sequence's offset and attends, in two launches."""
        rows = [(slot(n // PAGE) if n >= PAGE else 0) + n % PAGE for n in offsets]
        rows = mx.broadcast_to(mx.array(rows).reshape(1, -1, 1, 1, 1), tokens.kv.shape)
        self.raw = mx.put_along_axis(self.raw, rows, tokens.kv.astype(self.raw.dtype), 3)
        lengths = mx.array([n + 1 for n in offsets], mx.int32)
        y = mlx_gpu_kv.attend(
            tokens, self.raw, self.pool, lengths, form, table=self.table, gate=gate
        )
        for i, n in enumerate(offsets):
            if n >= PAGE and (n + 1) % PAGE == 0:
                self._store(i, n // PAGE)
        return y

    def _store(self, i: int, page: int) -> None:
        rows = self.raw[:, i, :, slot(page) : slot(page) + PAGE]
        for s, side in enumerate(self.sides[i]):
            if self.used == self.pool[s].shape[0]:
                self.pool[s] = _grown(self.pool[s])
            self.pool[s][self.used] = kv_encode(rows[s], side.codec, side=side.side)
        self.places[i].append(self.used)
        self.used += 1
        self._table = None

    def part(self, offsets: Sequence[int], kept: Sequence[int]) -> None:
        """Everything back to the sides."""
        for i, both in enumerate(self.sides):
            places = mx.array(self.places[i], mx.int32)
            for raw, pool, side in zip(self.raw[:, i : i + 1], self.pool, both, strict=True):
                pages = pool[places] if self.places[i] else pool[:0]
                side.pages = mx.contiguous(pages.swapaxes(0, 1)[None])
                side.take(raw, offsets[i], kept[i])


def _grown(pool: mx.array) -> mx.array:
    """Room for a quarter more, at least 8."""
    room = max(8, pool.shape[0] // 4)
    return mx.concatenate([pool, mx.zeros((room, *pool.shape[1:]), pool.dtype)])
