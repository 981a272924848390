"""Reads what an audit needs from an arm64 Mach-O file: symbols, libraries, version, signature.

Layouts are those of Apple's <mach-o/loader.h>, <mach-o/nlist.h> and, for signatures,
<kern/cs_blobs.h>. Every size and offset in a file is checked before use: `BadMachO` names it.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field

MAGIC, ARM64, DYLIB = 0xFEEDFACF, 0x0100000C, 6
SYMTAB, LOAD_DYLIB, ID_DYLIB, CODE_SIGNATURE, BUILD_VERSION = 0x2, 0xC, 0xD, 0x1D, 0x32
RPATH, WEAK_DYLIB, REEXPORT_DYLIB, DYLD_INFO = 0x8000001C, 0x80000018, 0x8000001F, 0x80000022
#: Library ordinals that are no library: looked up in every loaded one, in the program.
DYNAMIC_LOOKUP, EXECUTABLE = 0xFE, 0xFF


class BadMachO(ValueError):
    """The file is not what it says: which part, and the numbers."""


@dataclass
class MachO:
    """What one file says of itself.

    `needs` maps each undefined symbol to its library's path, or None where any loaded one may have
    it; `offers` are the symbols others may use. Versions are (major, minor).
    """

    filetype: int
    install_name: str | None = None
    libraries: list[str] = field(default_factory=list)
    rpaths: list[str] = field(default_factory=list)
    oldest_macos: tuple[int, int] | None = None
    needs: dict[str, str | None] = field(default_factory=dict)
    offers: set[str] = field(default_factory=set)
    signature: bytes = b""
    signature_at: int = 0


def read(data: bytes) -> MachO:
    """Parses a whole file."""
    magic, cpu, _, filetype, count, size = struct.unpack("<6I", _slice(data, 0, 24, "header"))
    if (magic, cpu) != (MAGIC, ARM64):
        raise BadMachO(f"not an arm64 Mach-O file: magic {magic:#x}, processor {cpu:#x}")
    found = MachO(filetype)
    commands = _slice(data, 32, size, "load commands")
    symbols, bindings = None, []
    at = 0
    for index in range(count):
        kind, length = struct.unpack("<2I", _slice(commands, at, 8, f"load command {index}"))
        if length < 8:
            raise BadMachO(f"load command {index} has {length} bytes, needs 8")
        body = _slice(commands, at, length, f"load command {index}")
        at += length
        if kind == SYMTAB:
            symbols = _fields(body, "<4I", "symbol table")
        elif kind == DYLD_INFO:
            start, length, _, _, lazy_start, lazy_length = _fields(body, "<8x6I", "loader's table")
            bindings = [(start, length), (lazy_start, lazy_length)]
        else:
            _command(found, kind, body, data)
    if symbols:
        _symbols(found, data, *symbols)
    for start, length in bindings:
        found.needs.update(_bindings(_slice(data, start, length, "bindings"), found.libraries))
    return found


def _command(found: MachO, kind: int, body: bytes, data: bytes) -> None:
    if kind in (LOAD_DYLIB, WEAK_DYLIB, REEXPORT_DYLIB):
        found.libraries.append(_string(body))
    elif kind == ID_DYLIB:
        found.install_name = _string(body)
    elif kind == RPATH:
        found.rpaths.append(_string(body))
    elif kind == BUILD_VERSION:
        platform, oldest = _fields(body, "<2I", "build version")
        if platform != 1:
            raise BadMachO(f"platform {platform}, needs 1 (macOS)")
        found.oldest_macos = (oldest >> 16, oldest >> 8 & 0xFF)
    elif kind == CODE_SIGNATURE:
        found.signature_at, size = _fields(body, "<2I", "code signature")
        found.signature = _slice(data, found.signature_at, size, "code signature")


def _symbols(found: MachO, data: bytes, at: int, count: int, names_at: int, names_size: int):
    names = _slice(data, names_at, names_size, "symbol names")
    table = _slice(data, at, 16 * count, "symbol table")
    for name_at, kind, _, desc, _ in struct.iter_unpack("<IBBHQ", table):
        external = kind & 0x01 and not kind & 0xE0  # not local, not a debugger's entry
        if not external:
            continue
        end = names.find(b"\0", name_at)
        if end < 0:
            raise BadMachO(f"symbol name at {name_at} does not end in {names_size} bytes")
        name = names[name_at:end].decode(errors="replace")
        if kind & 0x0E:  # has an address
            if not kind & 0x10:  # and is not private
                found.offers.add(name)
            continue
        ordinal = desc >> 8
        unnamed = ordinal in (0, DYNAMIC_LOOKUP, EXECUTABLE)  # zig writes 0, dyld reads bindings
        found.needs[name] = None if unnamed else _library(found.libraries, ordinal, name)


def _library(libraries: list[str], ordinal: int, name: str) -> str:
    if not 1 <= ordinal <= len(libraries):
        raise BadMachO(f"{name} is from library {ordinal} of {len(libraries)}")
    return libraries[ordinal - 1]


def _bindings(code: bytes, libraries: list[str]) -> dict[str, str | None]:
    """Runs the loader's little program that says which symbol is from which library."""
    found: dict[str, str | None] = {}
    library, name, at = None, "", 0
    while at < len(code):
        opcode, small = code[at] & 0xF0, code[at] & 0x0F
        at += 1
        if opcode == 0x10:
            library = _library(libraries, small, "a symbol")
        elif opcode == 0x20:
            ordinal, at = _number(code, at)
            library = _library(libraries, ordinal, "a symbol")
        elif opcode == 0x30:
            library = None
        elif opcode == 0x40:
            end = code.find(b"\0", at)
            if end < 0:
                raise BadMachO(f"symbol name in bindings at {at} does not end")
            name, at = code[at:end].decode(errors="replace"), end + 1
        elif opcode in (0x60, 0x70, 0x80, 0xA0):
            _, at = _number(code, at)
        elif opcode == 0xC0:
            _, at = _number(code, _number(code, at)[1])
        elif opcode not in (0x00, 0x50, 0x90, 0xB0):
            raise BadMachO(f"bindings have opcode {opcode:#x} at {at - 1}")
        if opcode in (0x90, 0xA0, 0xB0, 0xC0):
            found[name] = library
    return found


def _number(code: bytes, at: int) -> tuple[int, int]:
    """A LEB128 number and where it ends."""
    value = shift = 0
    while True:
        if at >= len(code):
            raise BadMachO(f"a number in bindings runs past their {len(code)} bytes")
        value |= (code[at] & 0x7F) << shift
        shift += 7
        at += 1
        if not code[at - 1] & 0x80:
            return value, at


def check_signature(found: MachO, data: bytes) -> int:
    """Compares every page with its hash in the signature; the number of pages.

    Apple silicon kills a process that loads a page without a matching hash.
    """
    if not found.signature:
        raise BadMachO("no code signature")
    magic, _, count = struct.unpack(">3I", _slice(found.signature, 0, 12, "signature"))
    if magic != 0xFADE0CC0:
        raise BadMachO(f"signature starts with {magic:#x}")
    pages = 0
    for index in range(count):
        entry = _slice(found.signature, 12 + 8 * index, 8, f"signature part {index}")
        kind, at = struct.unpack(">2I", entry)
        if kind == 0:  # the code directory
            pages = _check_pages(found, data, found.signature[at:])
    return pages


def _check_pages(found: MachO, data: bytes, directory: bytes) -> int:
    head = struct.unpack(">9I4B", _slice(directory, 0, 40, "code directory"))
    magic, _, _, flags, hashes_at, _, _, count, limit, hash_size, hash_kind, _, page_bits = head
    if (magic, hash_size, hash_kind) != (0xFADE0C02, 32, 2):
        raise BadMachO(
            f"code directory {magic:#x} with {hash_size}-byte hashes of kind {hash_kind}"
        )
    if not flags & 0x2:
        raise BadMachO("the signature is neither ad hoc nor checked here")
    if limit != found.signature_at:
        raise BadMachO(f"signed up to {limit}, the signature is at {found.signature_at}")
    page = 1 << page_bits
    if count != -(-limit // page):
        raise BadMachO(f"{count} hashes of {page}-byte pages for {limit} bytes")
    for index in range(count):
        want = _slice(directory, hashes_at + 32 * index, 32, f"hash {index}")
        if hashlib.sha256(data[index * page : min((index + 1) * page, limit)]).digest() != want:
            raise BadMachO(f"page {index} differs from its hash")
    return count


def _slice(data: bytes, at: int, size: int, what: str) -> bytes:
    if at + size > len(data):
        raise BadMachO(f"{what}: bytes {at} to {at + size} of {len(data)}")
    return data[at : at + size]


def _fields(body: bytes, layout: str, what: str) -> tuple[int, ...]:
    return struct.unpack(layout, _slice(body, 8, struct.calcsize(layout), what))


def _string(body: bytes) -> str:
    """The string of a load command: its third word says where it starts."""
    (at,) = _fields(body, "<I", "string")
    end = body.find(b"\0", at)
    if end < 0:
        raise BadMachO(f"string at {at} does not end in {len(body)} bytes")
    return body[at:end].decode(errors="replace")
