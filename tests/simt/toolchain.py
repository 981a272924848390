"""The compilers the simulator needs, and a cache of what they made.

Kernels need clang 19 or later: the system's where it is new enough, else the one inside PyPI's
`ziglang`. The engine needs any C++17 compiler.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
OLDEST_CLANG = 19
CACHED_FILES = 12000  # beyond this the oldest are deleted


class CompileError(RuntimeError):
    """A kernel (or the engine) does not compile; the message shows the source lines."""


def zig() -> str | None:
    """The zig program of the PyPI package `ziglang`, or None where it is not installed."""
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "zig"
    return str(path) if path.exists() else None


@cache
def clang() -> tuple[str, ...] | None:
    """The command that is clang, 19 or later: the system's, else ziglang's, else None."""
    for name in ("clang", *(f"clang-{v}" for v in range(30, OLDEST_CLANG - 1, -1))):
        path = shutil.which(name)
        if path and _major(path) >= OLDEST_CLANG:
            return (path,)
    program = zig()
    return (program, "clang") if program else None


def _major(path: str) -> int:
    """Version of a clang; 0 for Apple's, whose numbers and abilities differ."""
    text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"^(?:Debian |Ubuntu )?clang version (\d+)", text)
    return int(found[1]) if found else 0


@cache
def cxx() -> tuple[str, ...] | None:
    """A C++17 compiler for the engine; ziglang's builds its own libc++ first and is the slowest."""
    for name in ("g++", "c++", "clang++"):
        path = shutil.which(name)
        if path:
            return (path,)
    program = zig()
    return (program, "c++") if program else None


@cache
def missing() -> str | None:
    """Why the simulator cannot run here, for a test to skip with; None where it can."""
    if platform.machine() not in ("x86_64", "aarch64") or platform.system() != "Linux":
        return "the simulator runs on Linux, x86-64 or arm64"
    if clang() is None:
        return "the simulator needs clang >= 19 (pip install ziglang)"
    if cxx() is None:
        return "the simulator needs a C++ compiler (Debian: g++)"
    return None


@cache
def cache_folder() -> Path:
    """Where compiled kernels are kept between runs: ~/.cache, else the temporary directory."""
    home = Path.home() / ".cache" / "hadamoe-simt"
    for folder in (home, Path(tempfile.gettempdir()) / f"hadamoe-simt-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            _prune(folder)
            return folder
    raise OSError("no folder to keep compiled kernels in")


def _prune(folder: Path) -> None:
    paths = [path for path in folder.iterdir() if path.is_file()]
    if len(paths) > CACHED_FILES:
        with contextlib.suppress(FileNotFoundError):  # another process may prune too
            for path in sorted(paths, key=lambda p: p.stat().st_mtime)[: CACHED_FILES // 2]:
                path.unlink(missing_ok=True)


def digest(parts: Sequence[str]) -> str:
    """One name for everything a build depends on."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def cached(parts: Sequence[str], make: Callable[[Path], None], suffix: str = ".so") -> Path:
    """The file that `make(path)` writes, made once per digest of `parts`; safe across processes."""
    target = cache_folder() / (digest(parts) + suffix)
    if not target.exists():
        fresh = target.with_suffix(f".{os.getpid()}.tmp")
        make(fresh)
        os.replace(fresh, target)
    return target


def run(command: Sequence[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    """A compiler's run, its output captured; `text` goes to its standard input."""
    return subprocess.run(command, input=text, capture_output=True, text=True)


def link_command() -> list[str]:
    """Links one object to a shared library; what is undefined comes from the engine."""
    program = zig()
    if program and clang() == (program, "clang"):
        return [program, "ld.lld", "-shared"]
    return [*(cxx() or ()), "-shared", "-nostdlib"]


@cache
def fingerprint(folder: str) -> str:
    """Changes when a file below `folder` changes (by name, size and time, without reading it)."""
    facts = []
    for path, _, names in sorted(os.walk(folder)):
        for name in sorted(names):
            status = os.stat(os.path.join(path, name))
            facts.append(f"{path}/{name} {status.st_size} {status.st_mtime_ns}")
    return digest(facts)
