"""Builds runner.cpp with the core, straight from the sources: no Python module, no install.

Targets: ``native`` (this CPU's compiler), ``amx`` (the same, with AMX even where the CPU lacks it:
amx_traps.cpp), ``sanitized`` (with AddressSanitizer and UBSan, and such AMX), ``threads``
(ThreadSanitizer), ``aarch64`` (cross-compiled, run under qemu), ``m1`` (the same, its kernels by
the macOS wheel's compiler for a Mac's processor). Objects are cached by the hash of everything that
goes into them, in a folder of the system's temporary directory.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from simt import toolchain

ROOT = Path(__file__).resolve().parent.parent.parent
CSRC = ROOT / "csrc"
X86 = platform.machine() in ("x86_64", "AMD64")
CROSS = "aarch64-linux-gnu-g++"
COMMON = ["-std=c++17", "-pthread", "-ffp-contract=off"]
SANITIZE = ["-g1", "-O1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
EXTRA = {
    "native": [],
    "amx": [],
    "sanitized": [*SANITIZE, "-fsanitize=address,undefined"],
    "threads": [*SANITIZE, "-fsanitize=thread"],
    "aarch64": ["-static"],
    "m1": ["-static"],
}
ARM = ("aarch64", "m1")
#: What ziglang compiles for when a Mac is the target, with Linux's calling convention.
M1 = ["-target", "aarch64-linux-musl", "-mcpu=apple_m1"]
#: Targets that run AMX's instructions wherever they are.
TRAPS = ("amx", "sanitized")
#: Debian packages that bring what a target needs beyond a C++ compiler.
PACKAGES = {
    "aarch64": "g++-aarch64-linux-gnu and qemu-user",
    "m1": "g++-aarch64-linux-gnu and qemu-user; PyPI: ziglang",
}


def compiler(target: str) -> str | None:
    """The compiler of a target, or None where it is not installed."""
    if target in ARM and platform.machine() != "aarch64":
        return shutil.which(CROSS)
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def emulator(target: str) -> list[str]:
    """What runs a target's programs on this machine."""
    if target not in ARM or platform.machine() == "aarch64":
        return []
    return ["qemu-aarch64", *(["-cpu", "max"] if target == "m1" else [])]


@cache
def available(target: str) -> bool:
    """Whether the target can be built and run here (a sanitizer may be absent from a toolchain)."""
    cxx = compiler(target)
    if cxx is None or not all(map(shutil.which, emulator(target)[:1])):
        return False
    if target == "m1" and toolchain.zig() is None:
        return False
    with tempfile.TemporaryDirectory() as tmp:
        flags = [f for f in EXTRA[target] if f.startswith(("-fsanitize", "-static"))]
        probe = [cxx, "-x", "c++", "-", "-o", f"{tmp}/probe", *flags]
        if subprocess.run(probe, input=b"int main() {}", capture_output=True).returncode:
            return False
        run = [*emulator(target), f"{tmp}/probe"]  # a sanitizer may not start under a new kernel
        return subprocess.run(run, capture_output=True).returncode == 0


def missing(target: str) -> str:
    """What a skipped test says."""
    return f"{target} cannot be built here (Debian: {PACKAGES.get(target, 'g++')})"


def isa_flags() -> dict[str, list[str]]:
    """Flags per ISA as CMakeLists.txt sets them, so that tests run the code users run."""
    text = (ROOT / "CMakeLists.txt").read_text()
    flags: dict[str, list[str]] = {}
    for name, words in re.findall(r"set\(hm_flags_(\w+) ([^)]*)\)", text):
        words = re.sub(r"\$\{hm_flags_(\w+)\}", lambda m: " ".join(flags[m[1]]), words)
        flags[name] = words.split()
    return flags


def units(target: str) -> dict[Path, list[str]]:
    """Every translation unit of the runner and its own flags."""
    arm = target in ARM or not X86
    isas = ["generic", "neon"] if arm else ["generic", "avx2", "avx512", "amx"]
    flags = isa_flags()
    traps = Path(__file__).with_name("amx_traps.cpp")
    found = {CSRC / "core" / "pool.cpp": ["-O2"], Path(__file__).with_name("runner.cpp"): ["-O2"]}
    for path in sorted((CSRC / "cpu").glob("*.cpp")):
        if path.stem == "amx_usable" and target in TRAPS:
            found[traps] = ["-O2"]
        elif not path.stem.startswith("isa_"):
            found[path] = ["-O2"]
        elif path.stem.removeprefix("isa_") in isas:
            leaf = [
                "-fno-exceptions",
                "-fno-rtti",
                "-fno-asynchronous-unwind-tables",
                "-fno-math-errno",
            ]
            found[path] = [*flags[path.stem.removeprefix("isa_")], *leaf]
    return found


@cache
def _headers_hash() -> str:
    h = hashlib.sha256()
    for path in (*sorted(CSRC.rglob("*.h")), CSRC / "cpu" / "amx_usable.cpp"):
        h.update(path.read_bytes())
    return h.hexdigest()


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"hadamoe-native-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _make(command: list[str], output: Path) -> Path:
    if not output.exists():
        part = output.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        part.rename(output)
    return output


def compile_one(path: Path, target: str) -> Path:
    """The object file of one translation unit."""
    command = [compiler(target)]
    assert command[0], missing(target)
    kernels = path.stem.startswith("isa_")
    if target == "threads" and kernels:
        target = "native"  # kernels share nothing: races are in the pool and the ops
    if target == "m1" and kernels:
        command = [toolchain.zig(), "c++", *M1]
    # The target's flags come last: a sanitizer's -O1 replaces the -O3 of the kernels.
    command += [*COMMON, *units(target)[path], *EXTRA[target]]
    key = "".join([*command, _headers_hash(), path.read_text()])
    name = f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.o"
    return _make([*command, "-c", str(path)], _folder() / name)


def runner(target: str) -> Path:
    """The runner's executable for a target."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda path: compile_one(path, target), units(target)))
    key = " ".join(map(str, objects)) + target
    name = f"runner-{target}-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
    command = [compiler(target), *map(str, objects), *EXTRA[target], "-pthread"]
    return _make(command, _folder() / name)
