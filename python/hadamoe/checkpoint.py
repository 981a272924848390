"""A directory of safetensors shards, memory-mapped and checked before anything is believed.

Headers are parsed here, not by the safetensors library: the kernels need byte offsets, and each way
a file can be wrong deserves its own message. Whatever is accepted here the library accepts too.
Nothing but headers is read at opening, so 85,000 tensors in 30 GB open in about half a second.
"""

from __future__ import annotations

import mmap
import re
import sys
from collections.abc import Iterator
from math import prod
from operator import itemgetter
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import FormatError
from .strict_json import parse_json, read_json

#: safetensors dtype -> numpy dtype of the view. bf16 has no numpy dtype: its bits come as u16; fp8
#: as u8.
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(code)
    for name, code in {
        "BOOL": "?", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
        "U16": "<u2", "I16": "<i2", "F16": "<f2", "BF16": "<u2",
        "U32": "<u4", "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8",
    }.items()
}  # fmt: skip
#: Longest header accepted, as in the safetensors library.
HEADER_LIMIT = 100_000_000
INDEX = "model.safetensors.index.json"
#: Files that end in .safetensors and hold no model weights.
SIDECARS = frozenset({"jangtq_runtime.safetensors"})

_MAX_DIMS = 8
_PART_OF = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors$")
# Private mappings are writable views that never reach the file; without NORESERVE the kernel would
# set aside swap for all of them.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class Tensor(NamedTuple):
    """One stored tensor: where it is and a view of its bytes.

    ``dtype`` is the safetensors name; ``array`` is a view of the mapped file in ``DTYPES[dtype]``,
    possibly unaligned (MLX writes headers of any length).
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    array: np.ndarray

    def bytes_2d(self, rows: int) -> np.ndarray:
        """The same bytes as u8 ``[rows, bytes per row]``."""
        base = self.array.base
        start = self.array.__array_interface__["data"][0] - base.__array_interface__["data"][0]
        return np.ndarray((rows, self.array.nbytes // rows), np.uint8, buffer=base, offset=start)


class _Span(NamedTuple):
    shard: int
    dtype: str
    shape: tuple[int, ...]
    begin: int


class Shard:
    """One mapped file: its path, its bytes as one u8 array, and its header's entries."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():  # a pipe would never end, a link may lead nowhere
            found = "something else" if path.exists() else "none"
            raise FormatError(path, expected="a file", found=found)
        with open(path, "rb") as f:
            size = f.seek(0, 2)
            if size < 8:
                raise FormatError(path, expected="8 bytes of header length", found=f"{size} bytes")
            f.seek(0)
            length = int.from_bytes(f.read(8), "little")
            if length > HEADER_LIMIT:
                raise FormatError(
                    path,
                    expected=f"a header of at most {HEADER_LIMIT} bytes",
                    found=f"{length} (is this a safetensors file?)",
                )
            if length > size - 8:
                raise FormatError(
                    path,
                    expected=f"a header of {length} bytes",
                    found=f"{size - 8} bytes after its length",
                )
            header = f.read(length)
            if sys.platform == "linux":
                flags = mmap.MAP_PRIVATE | _NORESERVE
                prot = mmap.PROT_READ | mmap.PROT_WRITE
                self._map = mmap.mmap(f.fileno(), size, flags=flags, prot=prot)
            else:
                self._map = mmap.mmap(f.fileno(), size, access=mmap.ACCESS_COPY)
        self.data: np.ndarray = np.frombuffer(self._map, np.uint8)
        if not header.startswith(b"{"):
            raise FormatError(
                path, expected="a header that starts with '{'", found=repr(bytes(header[:8]))
            )
        entries = parse_json(header, path, "a JSON header")
        self.metadata = _metadata(entries.pop("__metadata__", None), path)
        self.entries = _entries(entries, path, 8 + length, size)


class Checkpoint:
    """The tensors of a model directory, by name, with a record of which were claimed."""

    def __init__(self, path: Path, shards: list[Shard], notes: list[str]) -> None:
        self.path, self.shards, self.notes = path, shards, notes
        self._spans: dict[str, _Span] = {}
        for i, shard in enumerate(shards):
            for name, (dtype, shape, begin) in shard.entries.items():
                if name in self._spans:
                    other = shards[self._spans[name].shard].path.name
                    raise FormatError(
                        shard.path, name, expected="one tensor of this name",
                        found=f"another in {other}",
                    )  # fmt: skip
                self._spans[name] = _Span(i, dtype, shape, begin)
        self._claimed: set[str] = set()
        self._config: dict[str, Any] | None = None

    @classmethod
    def open(cls, path: str | PathLike[str]) -> Checkpoint:
        """Map every shard of a directory and check all headers and the index; reads no weights.

        An index all of whose files are missing, beside a ``model.safetensors``, is stale (the TQ
        converter copies its source's index next to a single-file output): it is ignored and noted
        in ``notes``. Any other disagreement between the index and the files raises.

        Raises: FormatError naming file, tensor, expected and found.
        """
        root = Path(path)
        if not root.is_dir():
            raise FormatError(
                root, expected="a directory", found="a file" if root.exists() else "none"
            )
        present = sorted(
            p.name for p in root.iterdir() if p.suffix == ".safetensors" and p.name not in SIDECARS
        )
        if not present:
            raise FormatError(root, expected="*.safetensors files", found="none")
        index, notes = _index(root, present)
        _complete_series(root, present)
        checkpoint = cls(root, [Shard(root / name) for name in present], notes)
        if index is not None:
            checkpoint._check_index(index)
        return checkpoint

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self._spans

    def __len__(self) -> int:
        return len(self._spans)

    @property
    def config(self) -> dict[str, Any]:
        """config.json as a dict."""
        if self._config is None:
            config = self.json("config.json")
            if config is None:
                raise FormatError(
                    self.path / "config.json", expected="a model config", found="no file"
                )
            self._config = config
        return self._config

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(s.data.nbytes for s in self.shards)

    def json(self, filename: str) -> dict[str, Any] | None:
        """A JSON object beside the weights, or None where there is no such file."""
        return read_json(self.path / filename)

    def names(self) -> list[str]:
        """Names of all tensors, in file order."""
        return list(self._spans)

    def dtypes(self) -> Iterator[tuple[str, str]]:
        """(name, dtype) of all tensors."""
        return ((name, span.dtype) for name, span in self._spans.items())

    def tensor(self, name: str) -> Tensor:
        """One tensor as a view of the mapped file."""
        span = self._spans.get(name)
        if span is None:
            raise FormatError(self.path, name, expected="a tensor", found="no such name")
        shard = self.shards[span.shard]
        view: np.ndarray = np.ndarray(span.shape, DTYPES[span.dtype], shard.data, span.begin)
        return Tensor(name, str(shard.path), span.dtype, span.shape, view)

    def claim(self, name: str) -> Tensor:
        """`tensor`, and a mark that somebody knows what it is for."""
        self._claimed.add(name)
        return self.tensor(name)

    def unclaimed(self) -> list[str]:
        """Names nobody claimed, in file order."""
        return [name for name in self._spans if name not in self._claimed]

    def close(self) -> None:
        """Forget the shards. A file stays mapped as long as an array views it."""
        self.shards, self._spans = [], {}

    def _check_index(self, index: dict[str, str]) -> None:
        for name, file in index.items():
            span = self._spans.get(name)
            found = "no such tensor" if span is None else self.shards[span.shard].path.name
            if found != file:
                raise FormatError(self.path / INDEX, name, expected=f"it in {file}", found=found)
        for name, span in self._spans.items():
            if name not in index:
                file = self.shards[span.shard].path
                raise FormatError(file, name, expected=f"an entry in {INDEX}", found="none")


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if value is None:
        return {}
    if type(value) is not dict or not all(type(v) is str for v in value.values()):
        raise FormatError(path, "__metadata__", expected="a map of strings", found=_short(value))
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _natural(values: Any) -> bool:
    return type(values) is list and all(type(v) is int and 0 <= v < 1 << 63 for v in values)


def _entries(
    header: dict[str, Any], path: Path, start: int, size: int
) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Check every entry, then that the spans tile the data exactly; offsets count from the file."""
    limit = size - start
    keys = {"dtype", "shape", "data_offsets"}
    spans: list[tuple[int, int, str]] = []
    out: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for name, entry in header.items():
        if type(entry) is not dict or entry.keys() != keys:
            raise FormatError(
                path, name, expected="dtype, shape and data_offsets", found=_short(entry)
            )
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        kind = DTYPES.get(dtype) if type(dtype) is str else None
        if kind is None:
            raise FormatError(
                path, name, expected="a dtype of " + " ".join(DTYPES), found=_short(dtype)
            )
        if not _natural(shape) or len(shape) > _MAX_DIMS:
            raise FormatError(
                path, name, expected=f"a shape of at most {_MAX_DIMS} sizes 0 to 2^63-1",
                found=_short(shape),
            )  # fmt: skip
        if not _natural(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise FormatError(
                path, name, expected="data_offsets [begin, end]", found=_short(offsets)
            )
        begin, end = offsets
        if end > limit:
            raise FormatError(
                path,
                name,
                expected=f"a span inside {limit} bytes of data",
                found=f"[{begin}, {end}]",
            )
        need = prod(shape) * kind.itemsize
        if end - begin != need:
            raise FormatError(
                path, name, expected=f"{need} bytes for {dtype} {list(shape)}",
                found=f"{end - begin} in [{begin}, {end}]",
            )  # fmt: skip
        if begin % kind.itemsize:
            raise FormatError(
                path, name, expected=f"an offset that is a multiple of {kind.itemsize}",
                found=str(begin),
            )  # fmt: skip
        spans.append((begin, end, name))
        out[name] = (dtype, tuple(shape), start + begin)
    _check_tiling(sorted(spans, key=itemgetter(0, 1)), path, limit)
    return out


def _check_tiling(spans: list[tuple[int, int, str]], path: Path, limit: int) -> None:
    at, before = 0, "the start of the data"
    for begin, end, name in spans:
        if begin != at:
            what = "overlaps" if begin < at else "leaves a gap after"
            raise FormatError(
                path, name, expected=f"a span that begins at {at}",
                found=f"[{begin}, {end}], which {what} {before}",
            )  # fmt: skip
        at, before = end, name
    if at != limit:
        raise FormatError(path, expected=f"{at} bytes of data", found=f"{limit}")


def _index(root: Path, present: list[str]) -> tuple[dict[str, str] | None, list[str]]:
    """The weight map, checked against the files that exist; None where absent or stale."""
    path = root / INDEX
    index = read_json(path)
    if index is None:
        return None, []
    weight_map = index.get("weight_map")
    if type(weight_map) is not dict or not all(type(v) is str for v in weight_map.values()):
        raise FormatError(path, expected="a weight_map of file names", found=_short(weight_map))
    named = dict.fromkeys(weight_map.values())
    for file in named:
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise FormatError(path, expected="names of .safetensors files", found=_short(file))
    missing = [file for file in named if file not in present]
    if named and len(missing) == len(named) and "model.safetensors" in present:
        return None, [f"{INDEX} names {len(named)} files that do not exist: stale, ignored"]
    if missing:
        raise FormatError(path, expected=f"the file {missing[0]}", found="no such file")
    for file in present:
        if file not in named:
            raise FormatError(root / file, expected=f"an entry in {INDEX}", found="none")
    return weight_map, []


def _complete_series(root: Path, present: list[str]) -> None:
    """Files called x-00001-of-00004 must be all four, index or not."""
    series: dict[tuple[str, str], set[int]] = {}
    for name in present:
        if m := _PART_OF.match(name):
            series.setdefault((m[1], m[3]), set()).add(int(m[2]))
    for (stem, count), have in series.items():
        width, total = len(count), int(count)
        lost = next((i for i in range(1, total + 1) if i not in have), None)
        if lost is not None:
            name = f"{stem}-{lost:0{width}d}-of-{count}.safetensors"
            raise FormatError(root, expected=f"the file {name}", found="no such file")
        if len(have) > total:
            name = f"{stem}-{max(have):0{width}d}-of-{count}.safetensors"
            raise FormatError(root / name, expected=f"a number from 1 to {total}", found="another")
