"""Buffers of a kernel: each alone between pages it must not touch."""

from __future__ import annotations

import ctypes as C
import mmap

import numpy as np

GUARD = 65536
PAGE = 4096
_NO_ACCESS, _READ_WRITE = 0, 3
_PRIVATE_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

_libc = C.CDLL(None, use_errno=True)
_libc.mmap.restype = C.c_void_p
_libc.mmap.argtypes = [C.c_void_p, C.c_size_t, C.c_int, C.c_int, C.c_int, C.c_long]
_libc.munmap.argtypes = [C.c_void_p, C.c_size_t]
_libc.mprotect.argtypes = [C.c_void_p, C.c_size_t, C.c_int]


class DeviceMemory:
    """Memory a kernel sees. Fresh memory is 0xFF bytes: NaN as any float, -1 as an integer.

    With `soft` the surroundings of a buffer can be touched: the checker reports the access and the
    kernel goes on. Without, a buffer ends at an unmapped page and the access faults.
    """

    def __init__(self, soft: bool = False):
        self.soft = soft
        self._maps: list[tuple[int, int]] = []

    def __enter__(self) -> DeviceMemory:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _map(self, size: int, access: int) -> int:
        address = _libc.mmap(None, size, access, _PRIVATE_ANONYMOUS, -1, 0)
        if address in (None, C.c_void_p(-1).value):
            raise MemoryError(f"no {size} bytes for a simulated buffer")
        self._maps.append((address, size))
        return address

    def alloc(self, size: int, align: int = 16) -> int:
        """Address of `size` bytes of 0xFF."""
        if self.soft:
            address = self._map(size + 2 * GUARD, _READ_WRITE)
            C.memset(address, 0xFF, size + 2 * GUARD)
            return address + GUARD
        room = max(1, -(-size // PAGE)) * PAGE
        start = self._map(room + 2 * GUARD, _NO_ACCESS) + GUARD
        _libc.mprotect(start, room, _READ_WRITE)
        C.memset(start, 0xFF, room)
        return start + (room - size) // align * align

    def put(self, array: np.ndarray, align: int = 16) -> int:
        """Address of a copy of `array`."""
        address = self.alloc(max(array.nbytes, 1), align)
        C.memmove(address, array.ctypes.data, array.nbytes)
        return address

    def get(self, address: int, array: np.ndarray) -> None:
        """Copies what the kernel left at `address` to `array`."""
        C.memmove(array.ctypes.data, address, array.nbytes)

    def close(self) -> None:
        for address, size in self._maps:
            _libc.munmap(address, size)
        self._maps = []
