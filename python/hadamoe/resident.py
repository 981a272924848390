"""Weights copied once from their mapped files into memory that stays.

A mapped file is the default: it opens at once and the system keeps what is used. A copy is for
machines that page file pages out, and for speed: Linux backs anonymous memory with huge pages, and
a core then reads it faster.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np

from .errors import DeviceError, FormatError
from .formats import ModelFiles
from .weight import Part, Weight, root_of

__all__ = ["Progress", "available_bytes", "make_resident"]

#: Called with (bytes read, bytes in all).
Progress = Callable[[int, int], None]

_HUGE = 2 << 20
_CHUNK = 32 << 20
_ARRAYS = ("codes", "scale", "bias", "codebook")


def available_bytes() -> int | None:
    """Memory that can be taken without pushing other processes out; None where the OS won't say."""
    try:
        with open("/proc/meminfo") as f:
            fields = dict(line.split(":", 1) for line in f)
    except OSError:
        return None
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def make_resident(
    files: ModelFiles, *, vision: bool = True, progress: Progress | None = None
) -> int:
    """Point every weight of ``files`` at a copy in memory; what no weight uses is not read.

    Args:
        vision: whether the vision tower is used.
        progress: called after each 32 MB.

    Returns: bytes copied.

    Raises:
        DeviceError: less memory is available than the weights need.
        FormatError: a file is shorter than it was.
    """
    wanted = {p: w for p, w in files.weights.items() if vision or not p.startswith("visual.")}
    pictures = files.vision if vision else {}
    arrays = [a for w in wanted.values() for a in _arrays(w)]
    arrays += [s.array for s in pictures.values()]
    copies = {id(s.data): _Copy(s.path, s.data) for s in files.checkpoint.shards}
    for a in arrays:
        if (copy := copies.get(id(root_of(a)))) is not None:
            copy.want(a)
    need, have = sum(c.nbytes for c in copies.values()), available_bytes()
    if have is not None and need > have:
        raise DeviceError(
            f"load: resident weights need {need / 1e9:.2f} GB of memory ({need} bytes), "
            f"{have / 1e9:.2f} GB ({have} bytes) are available"
        )
    done = 0
    for copy in copies.values():
        for n in copy.read():
            done += n
            if progress is not None:
                progress(done, need)

    def moved(a: np.ndarray | None) -> np.ndarray | None:
        copy = None if a is None else copies.get(id(root_of(a)))
        return a if copy is None else copy.view(a)

    seen: dict[int, Weight] = {}  # a tied head is the embeddings' own object
    for path, w in wanted.items():
        if id(w) not in seen:
            seen[id(w)] = replace(w, parts=tuple(tuple(map(_mover(moved), e)) for e in w.parts))
        files.weights[path] = seen[id(w)]
    for name, s in pictures.items():
        files.vision[name] = s._replace(array=moved(s.array))
    return need


def _arrays(weight: Weight) -> Iterator[np.ndarray]:
    for expert in weight.parts:
        for part in expert:
            yield from (a for f in _ARRAYS if (a := getattr(part, f)) is not None)


def _mover(moved: Callable[[np.ndarray | None], np.ndarray | None]) -> Callable[[Part], Part]:
    return lambda part: replace(part, **{f: moved(getattr(part, f)) for f in _ARRAYS})


class _Copy:
    """What is wanted of one file, and its copy: same offsets, so memory between stays untouched."""

    def __init__(self, path: os.PathLike[str], data: np.ndarray) -> None:
        self._path, self._size, self._start = path, data.nbytes, _address(data)
        self._ends: dict[int, int] = {}  # begin -> end
        self._spans: list[list[int]] | None = None
        self._memory: np.ndarray | None = None

    def want(self, array: np.ndarray) -> None:
        begin = _address(array) - self._start
        self._ends[begin] = max(self._ends.get(begin, 0), begin + array.nbytes)

    @property
    def spans(self) -> list[list[int]]:
        """[begin, end) of what is wanted, ascending, apart."""
        if self._spans is None:
            self._spans = []
            for begin, end in sorted(self._ends.items()):
                if self._spans and begin <= self._spans[-1][1]:
                    self._spans[-1][1] = max(self._spans[-1][1], end)
                else:
                    self._spans.append([begin, end])
        return self._spans

    @property
    def nbytes(self) -> int:
        return sum(end - begin for begin, end in self.spans)

    def read(self) -> Iterator[int]:
        """Reads the file straight into the copy; yields the bytes of each piece."""
        if not self.spans:
            return
        self._memory = _allocate(self._size)
        view = memoryview(self._memory)
        with open(self._path, "rb", buffering=0) as f:
            for begin, end in self.spans:
                f.seek(begin)
                while begin < end:
                    n = f.readinto(view[begin : min(end, begin + _CHUNK)])
                    if not n:
                        found = f"{begin} bytes"
                        raise FormatError(self._path, expected=f"{self._size} bytes", found=found)
                    if hasattr(os, "posix_fadvise"):  # or the page cache holds a second copy
                        os.posix_fadvise(f.fileno(), begin, n, os.POSIX_FADV_DONTNEED)
                    begin += n
                    yield n

    def view(self, array: np.ndarray) -> np.ndarray:
        """The same bytes of the copy."""
        offset = _address(array) - self._start
        return np.ndarray(array.shape, array.dtype, self._memory, offset, array.strides)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _allocate(size: int) -> np.ndarray:
    """Memory that is only backed where it is touched; on Linux by huge pages where it can be."""
    if sys.platform != "linux":
        return np.empty(size, np.uint8)
    memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(memory, np.uint8)
    with suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    skip = -_address(whole) % _HUGE
    return whole[skip : skip + size]
