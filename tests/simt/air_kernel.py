"""Builds and runs one function of an Apple-compiled .metallib."""

from __future__ import annotations

import ctypes as C
import platform
from functools import cache
from pathlib import Path

import numpy as np

from . import air, core, toolchain
from .memory import DeviceMemory
from .mtllib import Metallib

ARCH = ("-march=x86-64-v3",) if platform.machine() == "x86_64" else ()
#: fmuladd becomes one rounding, as the shim's -ffp-contract=on makes it.
FLAGS = ("-w", "-O2", "-fPIC", "-ffp-contract=on", *ARCH)
UNUSED = np.zeros(64, np.uint8)


class AirKernel:
    """A kernel of ``library`` by its name; ``constants`` are [[function_constant(n)]] values.

    Raises KeyError for an unknown name or constant and `toolchain.CompileError` for bitcode or an
    intrinsic that is not understood.
    """

    def __init__(self, library: Metallib, name: str, constants: dict[int, int] | None = None):
        runtime()
        module = disassemble(library.bitcode(name))
        self.name = name
        self.arguments = air.arguments(module, name)
        self.path = str(build(air.lower(module, name, constants or {})))
        try:
            lib = C.CDLL(self.path)
        except OSError as error:  # an intrinsic without a body
            raise toolchain.CompileError(f"{name}: {error}") from None
        self._body = C.cast(lib.simt_body, C.c_void_p).value

    def __call__(
        self,
        buffers: dict[int, np.ndarray],
        threadgroup: tuple[int, int, int],
        **options,
    ) -> core.Result:
        """Runs with ``buffers`` by index, written in place; ``options`` as in `core.launch`.

        Buffers that only a function constant asks for may be left out.
        """
        addresses = (C.c_uint64 * len(self.arguments))()
        outputs = []
        with DeviceMemory() as memory:
            for i, a in enumerate(self.arguments):
                if a.kind != "buffer":
                    continue
                addresses[i] = memory.put(buffers.get(a.index, UNUSED))
                if a.index in buffers and a.writable:
                    outputs.append((addresses[i], buffers[a.index]))
            result = core.launch(
                self.path, self._body, C.addressof(addresses), threadgroup, **options
            )
            for address, array in outputs:
                memory.get(address, array)
        return result


@cache
def runtime() -> None:
    """Loads Apple's intrinsics, visible to every kernel."""
    core.engine()
    source = toolchain.HERE / "engine" / "air_rt.cpp"
    header = toolchain.HERE / "include" / "simt" / "abi.h"
    flags = ["-x", "c++", "-std=c++17", "-ffreestanding", *FLAGS, *freestanding_headers()]
    path = compiled(source.read_text() + header.read_text(), [*flags, str(source)])
    C.CDLL(str(path), mode=C.RTLD_GLOBAL)


def freestanding_headers() -> list[str]:
    """Where stdint.h lies for a clang that does not know, ziglang's."""
    program = toolchain.zig()
    return ["-isystem", str(Path(program).parent / "lib" / "include")] if program else []


@cache
def disassemble(bitcode: bytes) -> str:
    """The text of an LLVM module."""
    with toolchain.cached([bitcode.hex()], lambda p: p.write_bytes(bitcode), ".bc").open() as file:
        command = [*toolchain.clang(), "-w", "-S", "-emit-llvm", "-Xclang", "-disable-llvm-passes"]
        done = toolchain.run([*command, "-x", "ir", file.name, "-o", "-"])
    if done.returncode:
        raise toolchain.CompileError("clang does not read this bitcode:\n" + done.stderr[:2000])
    return done.stdout


def build(text: str) -> Path:
    """A module's shared library."""
    source = toolchain.cached([text], lambda p: p.write_text(text), ".ll")
    return compiled(text, ["-x", "ir", *FLAGS, str(source)])


def compiled(text: str, arguments: list[str]) -> Path:
    """The shared library that clang's ``arguments`` make; ``text`` is what it depends on."""

    def make(path: Path) -> None:
        part = path.with_suffix(".o")
        for command in (
            [*toolchain.clang(), *arguments, "-c", "-o", str(part)],
            [*toolchain.link_command(), str(part), "-o", str(path)],
        ):
            done = toolchain.run(command)
            if done.returncode:
                raise toolchain.CompileError(done.stderr[:4000])
        part.unlink()

    return toolchain.cached([text, *arguments, *toolchain.clang()], make)
