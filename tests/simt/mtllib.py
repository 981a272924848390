"""Apple's .metallib container: which functions it holds and where their LLVM bitcode lies.

Little-endian. Header: magic MTLB; u64 pairs (offset, size) of the function list at 24 and of the
modules at 72. List: u32 count; each entry is its u32 size and then tags of 4 letters, a u16 length
and that many bytes, up to ENDT, which has no length. NAME is the function's name; OFFT holds three
u64, the last one the module's offset within the modules; MDSZ is the module's size.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

HEADER = 88
BITCODE_MAGICS = (b"\xde\xc0\x17\x0b", b"BC\xc0\xde")  # with Apple's wrapper, and without


class MetallibError(ValueError):
    """The file is not what it says, with the place and the numbers."""


class Metallib:
    """The functions of one .metallib, given as bytes.

    Raises `MetallibError` when a size or an offset points outside the file.
    """

    def __init__(self, data: bytes):
        self._data = data
        if len(data) < HEADER or data[:4] != b"MTLB":
            raise MetallibError(f"no MTLB header in {len(data)} bytes starting {data[:4]!r}")
        functions = self._section("function list", 24)
        modules = self._section("modules", 72)
        self._modules: dict[str, tuple[int, int]] = {}
        for tags in entries(data, *functions):
            name = tag(tags, "NAME").rstrip(b"\0").decode()
            place, size = module_place(tags, name)
            if place + size > modules[1]:
                raise MetallibError(f"{name}: {size} bytes at {place} of {modules[1]} in modules")
            self._modules[name] = (modules[0] + place, size)

    def _section(self, what: str, at: int) -> tuple[int, int]:
        offset, size = struct.unpack_from("<QQ", self._data, at)
        if offset + size > len(self._data):
            raise MetallibError(f"{what}: {size} bytes at {offset} in a file of {len(self._data)}")
        return offset, size

    @property
    def names(self) -> list[str]:
        """Every function's name, in the file's order."""
        return list(self._modules)

    def bitcode(self, name: str) -> bytes:
        """The LLVM module of one function. KeyError when there is none of that name."""
        offset, size = self._modules[name]
        module = self._data[offset : offset + size]
        if module[:4] not in BITCODE_MAGICS:
            raise MetallibError(f"{name}: starts with {module[:4]!r}, not bitcode")
        return module


def entries(data: bytes, offset: int, size: int) -> Iterator[dict[str, bytes]]:
    """The tags of each entry of a function list."""
    end = min(offset + 4 + size, len(data))  # the size leaves out the count
    if end < offset + 4:
        raise MetallibError(f"function list at {offset} of {len(data)} bytes")
    (count,) = struct.unpack_from("<I", data, offset)
    offset += 4
    for number in range(count):
        if offset + 4 > end:
            raise MetallibError(f"function list ends in entry {number} of {count}")
        (length,) = struct.unpack_from("<I", data, offset)
        if length < 8 or offset + length > end:
            raise MetallibError(f"entry {number} of {length} bytes, {end - offset} are left")
        yield read_tags(data[offset + 4 : offset + length], number)
        offset += length


def read_tags(entry: bytes, number: int) -> dict[str, bytes]:
    """One entry's tags by name."""
    tags, at = {}, 0
    while entry[at : at + 4] != b"ENDT":
        if at + 6 > len(entry):
            raise MetallibError(f"entry {number} has no ENDT")
        (length,) = struct.unpack_from("<H", entry, at + 4)
        value = entry[at + 6 : at + 6 + length]
        if len(value) != length:
            raise MetallibError(f"entry {number}: tag of {length} bytes, {len(value)} are left")
        tags[entry[at : at + 4].decode("latin1")] = value
        at += 6 + length
    return tags


def tag(tags: dict[str, bytes], name: str, size: int | None = None) -> bytes:
    """One tag's bytes, ``size`` of them."""
    value = tags.get(name)
    if value is None or (size is not None and len(value) != size):
        found = "none" if value is None else f"{len(value)} bytes"
        raise MetallibError(f"tag {name}: {found}, expected {size or 'a name'}")
    return value


def module_place(tags: dict[str, bytes], name: str) -> tuple[int, int]:
    """Offset within the modules and size of one function's bitcode."""
    place = struct.unpack("<QQQ", tag(tags, "OFFT", 24))[2]
    (size,) = struct.unpack("<Q", tag(tags, "MDSZ", 8))
    if size < 4:
        raise MetallibError(f"{name}: module of {size} bytes")
    return place, size
