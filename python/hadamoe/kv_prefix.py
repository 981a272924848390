"""Beginnings of sequences kept for the next one that begins alike: pages by what they hold, beside
snapshots of the states that attention has no pages for."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .errors import ContractError
from .kv import PAGE
from .kv_cache import KVCache

__all__ = ["EVERY", "Hit", "PrefixCache"]

#: tokens between snapshots inside a long prompt
EVERY = 8192


class Hit(NamedTuple):
    """Where to go on: feed the ids from ``length`` on.

    Attributes:
        cache: one sequence that shares its pages with the prefix cache.
        states: arrays as they were given to `PrefixCache.put`; not to be written.
        length: tokens in cache and states.
    """

    cache: KVCache
    states: list[np.ndarray]
    length: int


class _Snapshot(NamedTuple):
    cache: KVCache
    states: list[np.ndarray]
    tail: bytes  # ids after the last full page
    chain: bytes  # key of the last full page
    pages: list[bytes]  # keys of pages in the cache

    @property
    def nbytes(self) -> int:
        held = self.cache.raw_bytes + self.cache.table.nbytes
        return held + sum(a.nbytes for a in self.states)


class PrefixCache:
    """Snapshots of sequences, least recently used first to go.

    A page is known by sha256(key of the page before, its 64 token ids), the first by the model, the
    formats, vectors and scales and the version of the codecs. Pages equal by key are one in memory,
    in snapshots and in the caches they came from.

    Args:
        budget_bytes: for pages, raw tokens and states of all snapshots.
        cache: any cache of the pool that pages are to lie in; it needs one without ``tokens``.
        model: names the weights: another model's pages are never found.
    """

    def __init__(self, budget_bytes: int, cache: KVCache, model: str = "") -> None:
        if cache.pool.fixed:
            raise ContractError("kv: a prefix cache needs a pool that grows, tokens=None")
        self.budget_bytes, self.origin = budget_bytes, cache.empty()
        self._root = hashlib.sha256(model.encode() + b"\0" + cache.identity()).digest()
        self._snapshots: OrderedDict[bytes, _Snapshot] = OrderedDict()
        self._places: dict[bytes, int] = {}
        self._users: Counter[bytes] = Counter()
        self._at: dict[bytes, list[bytes]] = {}  # key of the last full page -> snapshots

    def __len__(self) -> int:
        return len(self._snapshots)

    @property
    def nbytes(self) -> int:
        """Bytes held, a page once."""
        pages = len(self._places) * self.origin.pool.place_bytes
        return pages + sum(s.nbytes for s in self._snapshots.values())

    def put(self, cache: KVCache, ids: Any, states: Sequence[np.ndarray], row: int = 0) -> None:
        """Remembers sequence ``row`` of a cache where it stands now.

        Args:
            cache: of the same pool. Its pages known by key become the ones remembered.
            ids: all its token ids.
            states: arrays that belong to this position, copied.

        Raises:
            ContractError: a cache of another pool, or of another length than ids.
        """
        ids = _ids(ids)
        if cache.pool is not self.origin.pool or cache.identity() != self.origin.identity():
            raise ContractError(
                "kv: the cache is of another pool, needs PrefixCache.origin.empty()"
            )
        if cache.lengths[row] != len(ids):
            raise ContractError(f"kv: {len(ids)} ids for {cache.lengths[row]} tokens in the cache")
        chain = [self._root, *self._chain(ids)]
        tail = ids[len(ids) // PAGE * PAGE :].tobytes()
        key = hashlib.sha256(chain[-1] + b"+" + tail).digest()
        if key in self._snapshots:
            self._snapshots.move_to_end(key)
            return
        pages = []
        for p in np.flatnonzero(cache.table[row, : len(chain) - 1] >= 0):
            name = chain[p + 1]
            cache.share(row, int(p), self._places.setdefault(name, int(cache.table[row, p])))
            pages.append(name)
        self._users.update(pages)
        held = [np.array(a) for a in states]
        self._snapshots[key] = _Snapshot(cache.fork([row]), held, tail, chain[-1], pages)
        self._at.setdefault(chain[-1], []).append(key)
        while self.nbytes > self.budget_bytes:
            self._forget(next(iter(self._snapshots)))

    def find(self, ids: Any) -> Hit | None:
        """The longest remembered beginning of ids that leaves one of them to feed."""
        ids = _ids(ids)
        chain = [self._root, *self._chain(ids)]
        for full in range(len(chain) - 1, -1, -1):
            rest, best = ids[full * PAGE :].tobytes(), None
            for key in self._at.get(chain[full], ()):
                tail = self._snapshots[key].tail
                fits = rest.startswith(tail) and len(tail) < len(rest)
                if fits and (best is None or len(tail) > len(self._snapshots[best].tail)):
                    best = key
            if best is not None:
                self._snapshots.move_to_end(best)
                found = self._snapshots[best]
                return Hit(found.cache.fork(), found.states, int(found.cache.lengths[0]))
        return None

    def clear(self) -> None:
        """Forgets everything."""
        for key in list(self._snapshots):
            self._forget(key)

    def _forget(self, key: bytes) -> None:
        gone = self._snapshots.pop(key)
        self._at[gone.chain].remove(key)
        if not self._at[gone.chain]:
            del self._at[gone.chain]
        self._users.subtract(gone.pages)
        for name in gone.pages:
            if not self._users[name]:
                del self._users[name], self._places[name]

    def _chain(self, ids: np.ndarray) -> Iterator[bytes]:
        key = self._root
        for begin in range(0, len(ids) - PAGE + 1, PAGE):
            key = hashlib.sha256(key + ids[begin : begin + PAGE].tobytes()).digest()
            yield key


def _ids(ids: Any) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ContractError(f"kv: ids is {ids.dtype} {ids.shape}, needs integers [n]")
    return ids.astype("<i8")
