"""Memory that ends at an unmapped page: a kernel that reads on crashes instead of passing."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import replace

import numpy as np

from hadamoe.weight import Weight

_libc = ctypes.CDLL(None, use_errno=True)


def at_page_end(array: np.ndarray) -> np.ndarray:
    """A copy whose last byte is the last before an unmapped page."""
    size = -(-max(array.nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert _libc.mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0) == 0
    whole = np.frombuffer(memory, np.uint8, size)
    copy = whole[size - array.nbytes :].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def weight_at_page_ends(weight: Weight) -> Weight:
    """The same weight, every array of it at the end of a page of its own."""

    def moved(part):
        names = ("codes", "scale", "bias", "codebook")
        arrays = {n: getattr(part, n) for n in names if getattr(part, n) is not None}
        return replace(part, **{n: at_page_end(a) for n, a in arrays.items()})

    return replace(weight, parts=tuple(tuple(map(moved, expert)) for expert in weight.parts))
