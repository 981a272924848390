"""The .metallib reader: what it finds, and that a lying file is refused by name, not read past."""

from __future__ import annotations

import struct

import pytest

from simt.mtllib import Metallib, MetallibError

MODULE = b"BC\xc0\xde" + bytes(12)


def field(name: bytes, value: bytes) -> bytes:
    return name + struct.pack("<H", len(value)) + value


def entry(place: int = 0, size: int = len(MODULE), name: bytes = b"first\0") -> bytes:
    tags = field(b"NAME", name) + field(b"OFFT", struct.pack("<QQQ", 0, 0, place))
    tags += field(b"MDSZ", struct.pack("<Q", size)) + b"ENDT"
    return struct.pack("<I", 4 + len(tags)) + tags


def library(entries: bytes, count: int = 1, modules: bytes = MODULE) -> bytes:
    """A file as Apple's tools lay one out; the list's size leaves out its count."""
    start = 88
    header = bytearray(start)
    header[:4] = b"MTLB"
    struct.pack_into("<QQ", header, 24, start, len(entries))
    struct.pack_into("<QQ", header, 72, start + 4 + len(entries), len(modules))
    return bytes(header) + struct.pack("<I", count) + entries + modules


def test_functions_and_their_modules():
    found = Metallib(library(entry() + entry(8, 8, b"second\0"), 2, MODULE[:8] + MODULE[:8]))
    assert found.names == ["first", "second"]
    assert found.bitcode("second") == MODULE[:8]
    with pytest.raises(KeyError):
        found.bitcode("third")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no MTLB header"),
        (b"ELF!" + bytes(100), "no MTLB header"),
        (library(entry())[:-1], "modules: 16 bytes"),
        (library(entry(), count=2), "function list ends in entry 1 of 2"),
        (library(struct.pack("<I", 2**31) + bytes(8)), "entry 0 of 2147483648 bytes"),
        (library(struct.pack("<I", 12) + b"NAME\xff\xff"), "entry 0"),
        (library(struct.pack("<I", 16) + b"NAME\x02\x00ab" + bytes(4)), "entry 0"),
        (library(entry(place=8)), "16 bytes at 8 of 16 in modules"),
        (library(entry(size=1)), "module of 1 bytes"),
        (library(struct.pack("<I", 8) + b"ENDT"), "tag NAME: none"),
    ],
)
def test_a_lying_file_is_refused(data, message):
    with pytest.raises(MetallibError, match=message):
        Metallib(data)


def test_a_module_must_be_bitcode():
    with pytest.raises(MetallibError, match="not bitcode"):
        Metallib(library(entry(), modules=bytes(16))).bitcode("first")
