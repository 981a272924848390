"""A quantized KV cache: pages behind a table, and what happens to them over a sequence's life.

Holds numpy arrays only; `kv_ops.kv_attend` reads and writes them for any framework. A forward pass
is ``reserve(counts)``, one ``attend`` (or ``layer``) per layer, ``advance()``.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any, Self

import numpy as np

from . import kv_file
from .errors import ContractError
from .kv import PAGE, KVFormat, formats_of
from .kv_ops import KVLayer, kv_attend
from .kv_pool import Pool

__all__ = ["KVCache"]

#: of the bytes in a page and of what attention makes of them; part of every key and file
VERSION = 1
#: cache dtype -> how numpy holds it (bf16: its bits)
DTYPES = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}
_COLUMNS = 16  # of a table at first
_SHARED = (
    "formats", "heads", "head_dim", "dtype", "tokens", "window", "vectors", "scales", "pool",
)  # fmt: skip


class KVCache:
    """Keys and values of all attention layers for a batch of sequences.

    A page is 64 tokens, counted from a sequence's own first token. Page 0 stays raw, page p >= 1 is
    encoded when it is full; the newest page and the one before it are raw as well, so the last
    tokens can be taken back. Place i of ``table`` is valid in the arrays of every layer.

    Args:
        layers, heads, head_dim: attention layers, KV heads of each and their width.
        kv: a preset of `hadamoe.kv`, or one per layer.
        batch: sequences.
        dtype: of raw keys and values: "bfloat16", "float16" or "float32".
        tokens: of each sequence at most: allocates once, shapes never change. None grows by
            doubling.
        window: pages before its own that a query sees beside page 0; None for all. Pages left
            behind give their places back; with ``tokens``, there are places for passes of
            64 * window tokens.
        vectors: f32 ``[layers, 4, heads, head_dim]``: key mean, key balance, value mean, value
            balance, or None.
        scales: f32 ``[layers, 2]``: of fp8 keys and values, or None for 1.

    Raises:
        ContractError: a size, name or number out of range.
    """

    def __init__(
        self, layers: int, heads: int, head_dim: int, kv: str | Sequence[str] = "hk8v8", *,
        batch: int = 1, dtype: str = "bfloat16", tokens: int | None = None,
        window: int | None = None, vectors: Any = None, scales: Any = None,
    ) -> None:  # fmt: skip
        sizes = {"layers": layers, "heads": heads, "batch": batch, "tokens": tokens}
        for name, value in (sizes | {"window": window}).items():
            if value is not None and (int(value) != value or value < 1):
                raise ContractError(f"kv: {name} is {value}, needs at least 1")
        if dtype not in DTYPES:
            raise ContractError(f"kv: dtype is {dtype!r}, needs one of {', '.join(DTYPES)}")
        self.formats = formats_of(kv, layers)
        self.heads, self.head_dim, self.dtype = heads, head_dim, dtype
        self.tokens, self.window = tokens, window
        self.vectors = _vectors(vectors, (layers, 4, heads, head_dim))
        self.scales = _numbers("scales", scales, (layers, 2), positive=True)
        places = None if tokens is None else batch * _places(tokens, window)
        self.pool = Pool(self.formats, heads, head_dim, places)
        self._start(batch)
        if not isinstance(kv, str):
            _warn_of_raw(self.formats)

    def _start(self, batch: int) -> None:
        """Empty sequences."""
        shape = (batch, self.heads, 3, PAGE, self.head_dim)
        make = lambda: [np.zeros(shape, DTYPES[self.dtype]) for _ in self.formats]  # noqa: E731
        self.raw_keys, self.raw_values = make(), make()
        columns = _COLUMNS if self.tokens is None else -(-self.tokens // PAGE)
        self.table = np.full((batch, columns), -1, np.int32)
        self.lengths = np.zeros(batch, np.int64)
        # first page whole in the raw slots as far as it goes; first coded page still there
        self.raw_from, self.kept_from = np.ones((2, batch), np.int64)
        self._pending: np.ndarray | None = None

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self.lengths)

    def reserve(self, counts: Any) -> None:
        """Finds places for the pages that a forward pass of so many tokens fills.

        Args:
            counts: new tokens, one number or one per sequence.

        Raises:
            ContractError: more tokens than fit, or a failed pass before has overwritten tokens
                of the open page; nothing changes.
        """
        counts = self._counts("reserve", counts)
        after = self.lengths + counts
        if self.tokens is not None and (after > self.tokens).any():
            s = int(np.argmax(after > self.tokens))
            found = f"{self.lengths[s]} + {counts[s]} tokens"
            raise ContractError(f"kv: sequence {s} has {found}, needs at most {self.tokens}")
        self.check_whole()
        self.widen(int(-(-after.max() // PAGE)))
        fills = np.flatnonzero(after // PAGE > np.maximum(self.lengths // PAGE, 1))
        if fills.size:  # one token in 64
            self._find_places(fills, after)
        self.raw_from = np.maximum(self.raw_from, (after - 1) // PAGE - 1)
        self._pending = counts

    def _find_places(self, rows: np.ndarray, after: np.ndarray) -> None:
        spots = [
            (s, p)
            for s in rows
            for p in range(max(1, self.lengths[s] // PAGE), after[s] // PAGE)
            if self.table[s, p] < 0
        ]
        for spot, place in zip(spots, self.pool.take(len(spots)), strict=True):
            self.table[spot] = place

    def check_whole(self) -> None:
        """Raises ContractError where a pass that failed has overwritten tokens of an open page."""
        lost = (self.lengths % PAGE > 0) & (self.lengths >= PAGE)
        lost &= self.lengths // PAGE < self.raw_from
        if lost.any():
            s = int(np.argmax(lost))
            raise ContractError(
                f"kv: a pass that failed has overwritten tokens of sequence {s} after "
                f"{self.lengths[s] // PAGE * PAGE}; trim it there"
            )

    def layer(self, i: int) -> KVLayer:
        """What ops of attention layer i read and write, until the next `reserve`."""
        return KVLayer(
            self.formats[i], self.raw_keys[i], self.raw_values[i], self.pool.keys[i],
            self.pool.values[i], self.table, self.window or 0,
            None if self.vectors is None else self.vectors[i],
            None if self.scales is None else self.scales[i],
        )  # fmt: skip

    def attend(self, i: int, q: Any, k: Any, v: Any) -> Any:
        """`kv_attend` of layer i for the tokens reserved: ``[b, t, h, d]``."""
        return kv_attend(q, k, v, self.layer(i), self.lengths, self.reserved)

    def append(self, i: int, k: Any, v: Any) -> None:
        """`attend` without a query."""
        kv_attend(None, k, v, self.layer(i), self.lengths, self.reserved)

    @property
    def reserved(self) -> np.ndarray:
        """i64 ``[b]``: tokens of the pass under way.

        Raises:
            ContractError: there is none.
        """
        if self._pending is None:
            raise ContractError("kv: no tokens are reserved, needs reserve(counts) first")
        return self._pending

    def advance(self, counts: Any = None) -> None:
        """Every layer has the tokens reserved; ``counts`` may say again how many. Pages a window
        has left behind are dropped."""
        if counts is not None and (self._counts("advance", counts) != self.reserved).any():
            raise ContractError(f"kv: advance has counts={counts}, needs {self.reserved}")
        self.lengths += self.reserved
        self._pending = None
        if self.window is not None:
            # one page more than a query sees: taking tokens back must find it
            keep = np.maximum((self.lengths - 1) // PAGE - 1 - self.window, self.kept_from)
            for s in np.flatnonzero(keep > self.kept_from):
                self._drop(s, self.kept_from[s], keep[s])
            self.kept_from = keep

    def trim(self, n: Any) -> None:
        """Takes the last n tokens of each sequence back, as if they had never come: what comes
        after has the same bits.

        Args:
            n: one number or one per sequence.

        Raises:
            ContractError: a sequence would end inside a page that is no longer raw, or before
                pages that a window has dropped; nothing changes.
        """
        after = self.lengths - self._counts("trim", n)
        page = after // PAGE
        coded = (after % PAGE > 0) & (page > 0) & (page < self.raw_from)
        seen = 1 if self.window is None else np.maximum(page - self.window, 1)
        gone = (page > 1) & (seen < self.kept_from)
        if (bad := (after < 0) | coded | gone).any():
            s = int(np.argmax(bad))
            least = max(int(self.raw_from[s]), 1) * PAGE
            why = f"a multiple of {PAGE}, less than {PAGE}, or at least {least}"
            if gone[s]:
                least = (self.kept_from[s] + self.window) * PAGE
                why = f"at least {least}, or at most {2 * PAGE - 1}"
            raise ContractError(
                f"kv: trim would leave {after[s]} of {self.lengths[s]} tokens of sequence {s}, "
                f"needs {why if after[s] >= 0 else 'none or more'}"
            )
        for s in range(self.batch):
            self._drop(s, max(1, page[s]), self.table.shape[1])
        self.raw_from = np.minimum(self.raw_from, np.maximum(page, 1))
        self.kept_from = np.where(page > 1, self.kept_from, 1)
        self.lengths, self._pending = after, None

    def fork(self, rows: Any = None) -> Self:
        """A cache of some of the sequences that shares their pages; raw tokens are copied.

        Args:
            rows: indices of sequences, in any order and repeated; None for all.
        """
        rows = np.arange(self.batch) if rows is None else np.asarray(rows)
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise ContractError(f"kv: rows is {rows.dtype} {rows.shape}, needs integers [n]")
        if rows.size and (rows.min() < 0 or rows.max() >= self.batch):
            raise ContractError(f"kv: rows has {rows.tolist()}, needs 0 to {self.batch - 1}")
        new = self._sibling()
        new.raw_keys = [a[rows] for a in self.raw_keys]
        new.raw_values = [a[rows] for a in self.raw_values]
        columns = np.arange(self.table.shape[1])
        full = columns < (self.lengths // PAGE)[:, None]  # not what a pass under way is to fill
        new.table = np.where(full, self.table, np.int32(-1))[rows]
        new.lengths, new.raw_from = self.lengths[rows], self.raw_from[rows]
        new.kept_from, new._pending = self.kept_from[rows], None
        self.pool.hold(new.places())
        return new

    __copy__ = fork

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.fork()

    def empty(self, batch: int = 1) -> Self:
        """A cache without tokens that takes its pages from the same pool."""
        new = self._sibling()
        new._start(batch)
        return new

    def share(self, s: int, page: int, place: int) -> None:
        """Page ``page`` of sequence s lies at ``place`` from now on, where its equal is."""
        self.pool.hold([place])
        self.pool.release([int(self.table[s, page])])
        self.table[s, page] = place

    def _sibling(self) -> Self:
        new = object.__new__(type(self))
        for name in _SHARED:
            setattr(new, name, getattr(self, name))
        return new

    def __del__(self) -> None:
        if hasattr(self, "_pending"):  # else it was never whole
            self.pool.release(self.places())

    def places(self) -> Iterator[int]:
        """Places in the table, repeats included."""
        return (int(i) for i in self.table[self.table >= 0])

    @property
    def token_bytes(self) -> int:
        """Bytes of one stored token, all layers and heads."""
        return self.pool.place_bytes // PAGE

    @property
    def coded_bytes(self) -> int:
        """Bytes of full pages in use, one shared by several sequences once."""
        full = np.arange(self.table.shape[1]) < (self.lengths // PAGE)[:, None]
        return len(np.unique(self.table[full & (self.table >= 0)])) * self.pool.place_bytes

    @property
    def raw_bytes(self) -> int:
        """Bytes of raw slots."""
        return sum(a.nbytes for a in (*self.raw_keys, *self.raw_values))

    @property
    def nbytes(self) -> int:
        """Bytes in use: full pages, raw slots, table."""
        return self.coded_bytes + self.raw_bytes + self.table.nbytes

    def describe(self) -> str:
        """What is stored how, layer by layer, and what it takes."""
        width = self.heads * self.head_dim * 2 * 2 * len(self.formats)
        lines = [
            f"KV cache: {len(self.formats)} layers, {self.heads} heads of {self.head_dim}, "
            f"{self.token_bytes} bytes per token, {width / self.token_bytes:.2f}x less than 16 bits"
        ]
        begin = 0
        for i, f in enumerate(self.formats):
            if i + 1 < len(self.formats) and self.formats[i + 1] == f:
                continue
            which = f"layer {i}" if i == begin else f"layers {begin}-{i}"
            sides = zip(("keys", "values"), f, self.pool.sizes[i], strict=True)
            parts = (f"{side} {_name(c)}, {size / PAGE:g} B" for side, c, size in sides)
            lines.append(f"  {which}: {'; '.join(parts)} per token and head")
            begin = i + 1
        w = self.window
        seen = "all pages" if w is None else f"page 0 and {w} pages before its own"
        lines.append(f"  a token sees {seen}; page 0 and the newest two are raw ({self.dtype})")
        lines.append(
            f"  {self.batch} sequences, {int(self.lengths.sum())} tokens: "
            f"{self.coded_bytes:,} B coded, {self.raw_bytes:,} B raw, {self.table.nbytes:,} B table"
        )
        return "\n".join(lines)

    def identity(self) -> bytes:
        """A digest of all that pages mean: formats, shapes, vectors, scales, version."""
        h = hashlib.sha256(repr((
            VERSION, [tuple(f) for f in self.formats], self.heads, self.head_dim, self.dtype,
            self.window,
        )).encode())  # fmt: skip
        for array in (self.vectors, self.scales):
            h.update(b"-" if array is None else array.tobytes())
        return h.digest()

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a safetensors file, under another name until it is whole.

        Raises:
            ContractError: a pass that failed has overwritten tokens of an open page.
        """
        kv_file.save(self, VERSION, path)

    @classmethod
    def load(cls, path: str | PathLike[str], *, tokens: int | None = None) -> Self:
        """A cache that goes on where the saved one stood.

        Raises:
            FormatError: the file is not such a cache, naming the tensor.
        """
        return kv_file.load(cls, VERSION, path, tokens)

    def _counts(self, what: str, counts: Any) -> np.ndarray:
        counts = np.asarray(counts)
        if counts.dtype.kind not in "iu" or counts.shape not in ((), (self.batch,)):
            raise ContractError(
                f"kv: {what} has {counts.dtype} {counts.shape}, needs a number or [{self.batch}]"
            )
        if (counts < 0).any():
            raise ContractError(f"kv: {what} has {counts.min()}, needs 0 or more")
        return np.broadcast_to(counts, self.batch).astype(np.int64)

    def widen(self, columns: int) -> None:
        """Makes the table at least this wide."""
        have = self.table.shape[1]
        if columns > have:
            more = np.full((self.batch, max(columns, 2 * have) - have), -1, np.int32)
            self.table = np.concatenate([self.table, more], 1)

    def _drop(self, s: int, begin: int, end: int) -> None:
        places = self.table[s, begin:end]
        self.pool.release(int(i) for i in places[places >= 0])
        self.table[s, begin:end] = -1


def _places(tokens: int, window: int | None) -> int:
    every = max(tokens // PAGE - 1, 0)
    return every if window is None else min(every, 2 * window + 2)


def _name(codec: str) -> str:
    return "unquantized (bf16)" if codec == "bf16" else codec


def _warn_of_raw(formats: Sequence[KVFormat]) -> None:
    raw = [i for i, f in enumerate(formats) if f.raw]
    if raw:
        which = ", ".join(map(str, raw))
        warnings.warn(f"kv: layers left unquantized: {which}", UserWarning, stacklevel=3)


def _numbers(name: str, value: Any, shape: tuple[int, ...], positive: bool) -> np.ndarray | None:
    if value is None:
        return None
    value = np.ascontiguousarray(value, np.float32)
    if value.shape != shape:
        raise ContractError(f"kv: {name} has {list(value.shape)}, needs {list(shape)}")
    if not np.isfinite(value).all() or (positive and (value <= 0).any()):
        needs = "finite numbers" + " above 0" * positive
        raise ContractError(f"kv: {name} has {value.min()} to {value.max()}, needs {needs}")
    return value


def _vectors(value: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    value = _numbers("vectors", value, shape, positive=False)
    if value is not None:
        _numbers("balance", value[:, 1::2], value[:, 1::2].shape, positive=True)
    return value
