"""Places for pages of a quantized KV cache, shared by the caches that grew from one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from .errors import ContractError
from .kv import KVFormat, page_bytes

__all__ = ["Pool"]

_LEAST = 16  # places a pool has at first
_LINE = 64  # bytes kernels load at once


class Pool:
    """One allocator for all layers: place i is row i of every layer's arrays.

    Args:
        formats: of each layer.
        heads, head_dim: of keys and values.
        places: allocated once, for good; None grows by doubling.

    Attributes:
        keys, values: u8 ``[places, heads, bytes]`` per layer. Growing replaces them.
        refs: i32 ``[places]``: holders of each place.
    """

    def __init__(
        self, formats: Sequence[KVFormat], heads: int, head_dim: int, places: int | None = None
    ) -> None:
        self.sizes = [tuple(page_bytes(codec, head_dim) for codec in f) for f in formats]
        self.heads, self.fixed = heads, places is not None
        self.keys, self.values = ([_bytes(0, heads, s[i]) for s in self.sizes] for i in (0, 1))
        self.refs = np.zeros(0, np.int32)
        self._free: list[int] = []
        if places is not None:
            self._grow(places)

    @property
    def place_bytes(self) -> int:
        """Bytes of one place: 64 tokens of every layer and head."""
        return self.heads * sum(map(sum, self.sizes))

    def take(self, count: int) -> list[int]:
        """New places, lowest first, each held once.

        Raises:
            ContractError: places were allocated for good and too few are free; nothing is taken.
        """
        if count > len(self._free):
            places = len(self.refs)
            if self.fixed:
                raise ContractError(
                    f"kv: the cache has {places} pages, {len(self._free)} free, needs {count} more"
                )
            self._grow(max(_LEAST, 2 * places, places + count - len(self._free)))
        taken = [self._free.pop() for _ in range(count)]
        self.refs[taken] = 1
        return taken

    def hold(self, places: Iterable[int]) -> None:
        """Counts one more holder of each of these, repeats included."""
        np.add.at(self.refs, np.fromiter(places, np.int64), 1)

    def release(self, places: Iterable[int]) -> None:
        """Counts one holder less; what nobody holds is free."""
        ids = np.fromiter(places, np.int64)
        np.subtract.at(self.refs, ids, 1)
        self._free += sorted({int(i) for i in ids if self.refs[i] == 0}, reverse=True)

    def _grow(self, places: int) -> None:
        before = len(self.refs)
        for arrays, side in ((self.keys, 0), (self.values, 1)):
            for i, old in enumerate(arrays):  # one layer at a time: the copies are never all there
                arrays[i] = _bytes(places, self.heads, self.sizes[i][side])
                arrays[i][:before] = old
        self.refs = np.concatenate([self.refs, np.zeros(places - before, np.int32)])
        self._free[:0] = range(places - 1, before - 1, -1)


def _bytes(places: int, heads: int, size: int) -> np.ndarray:
    """u8 [places, heads, size] that begins where a cache line does."""
    count = places * heads * size
    room = np.empty(count + _LINE, np.uint8)
    begin = -room.ctypes.data % _LINE
    return room[begin : begin + count].reshape(places, heads, size)
