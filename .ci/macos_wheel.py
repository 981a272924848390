"""The wheels for Macs with Apple silicon, built on Linux.

    python .ci/macos_wheel.py [--python PYTHON] [--mlx MLX_METAL_WHEEL] OUT

Needs, from PyPI, cmake, nanobind, ninja, scikit-build-core and ziglang (the compiler:
clang with Apple's headers). One wheel is for this interpreter's version; with MLX's own macOS wheel
it has the module `_mlx` for that MLX. Another is made with the headers of PYTHON, where that is
3.12 or later, for all versions from there on.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import nanobind
import ninja
import ziglang
from scikit_build_core.build import build_wheel

ROOT = Path(__file__).resolve().parent.parent
OLDEST_MACOS = "14.0"  # MLX's own
PLATFORM = f"macosx_{OLDEST_MACOS.replace('.', '_')}_arm64"
#: One file per version of Python from here on: the stable ABI, as `wheel.py-api` in pyproject.toml.
STABLE_SINCE = (3, 12)
ASK_PYTHON = """
import json, sys, sysconfig
print(json.dumps([*sys.version_info[:2], sysconfig.get_path("include")]))
"""


def pure_part(folder: Path) -> Path:
    """The wheel of everything but the compiled modules."""
    os.chdir(ROOT)
    with contextlib.redirect_stdout(sys.stderr):
        return folder / build_wheel(str(folder), {"wheel.cmake": "false", "wheel.py-api": ""})


def compile_modules(folder: Path, python: str, mlx: Path | None) -> tuple[Path, str]:
    """The compiled modules, in an installed tree, and the tags of Python and ABI.

    Called again with another Python it compiles only what includes Python's headers.
    """
    major, minor, include = json.loads(subprocess.check_output([python, "-c", ASK_PYTHON]))
    stable = (major, minor) >= STABLE_SINCE and mlx is None
    define = {
        "CMAKE_TOOLCHAIN_FILE": ROOT / ".ci/macos/toolchain.cmake",
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR) / "ninja",
        "ZIG": Path(ziglang.__file__).parent / "zig",
        "MACOS": OLDEST_MACOS,
        "HM_WERROR": "ON",
        "Python_EXECUTABLE": python,
        "Python_INCLUDE_DIR": include,
        "nanobind_DIR": nanobind.cmake_dir(),
        "SKBUILD_SOABI": f"cpython-{major}{minor}-darwin",
        "HM_MLX": "ON" if mlx else "OFF",
    }
    if stable:
        define |= {"SKBUILD_SABI_COMPONENT": "Development.SABIModule", "SKBUILD_SOSABI": "abi3"}
    if mlx:
        define |= {"MLX_DIR": mlx / "share/cmake/MLX"}
    os.environ["ZIG_GLOBAL_CACHE_DIR"] = os.environ["ZIG_LOCAL_CACHE_DIR"] = str(folder / "zig")
    forget = ["-U*Python*", "-USKBUILD*"]  # what the last call found
    options = [*forget, *(f"-D{name}={value}" for name, value in define.items())]
    cmake = [sys.executable, "-m", "cmake"]
    tag = f"cp{major}{minor}-{'abi3' if stable else f'cp{major}{minor}'}"
    run(*cmake, "-S", ROOT, "-B", folder / "build", "-G", "Ninja", *options)
    run(*cmake, "--build", folder / "build")
    run(*cmake, "--install", folder / "build", "--prefix", folder / tag)
    return folder / tag, tag


def unpacked_mlx(wheel: Path, folder: Path) -> Path:
    """MLX's headers and library, which must be those of this Python's version of MLX."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "mlx")
    (info,) = (folder / "mlx").glob("*.dist-info")
    version = info.name.removesuffix(".dist-info").split("-")[1]
    installed = subprocess.check_output([sys.executable, "-m", "mlx", "--version"], text=True)
    if installed.strip() != version:
        sys.exit(f"{wheel} is mlx {version}, needs this Python's {installed.strip()}")
    return folder / "mlx" / "mlx"


def pack(pure: Path, installed: Path, tag: str, out: Path) -> Path:
    """Writes the wheel: the pure one's files, the compiled ones, new WHEEL and RECORD."""
    project, version, *_ = pure.name.split("-")
    target = out / f"{project}-{version}-{tag}.whl"
    info = f"{project}-{version}.dist-info"
    with zipfile.ZipFile(pure) as archive:
        files = {i.filename: archive.read(i) for i in archive.infolist() if not i.is_dir()}
    files |= {
        str(p.relative_to(installed)): p.read_bytes() for p in installed.rglob("*") if p.is_file()
    }
    lines = files[f"{info}/WHEEL"].decode().splitlines()
    kept = [line for line in lines if line and not line.startswith(("Tag:", "Root-Is-Purelib:"))]
    kept += ["Root-Is-Purelib: false", f"Tag: {tag}"]
    files[f"{info}/WHEEL"] = "\n".join([*kept, ""]).encode()
    del files[f"{info}/RECORD"]
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        record = "".join(record_line(name, data) for name, data in files.items())
        for name, data in (files | {f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}).items():
            entry = zipfile.ZipInfo(name)  # of 1980: the same sources give the same bytes
            entry.external_attr = (0o100755 if name.endswith(".so") else 0o100644) << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return target


def record_line(name: str, data: bytes) -> str:
    """One line of RECORD: file, hash, size."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}\n"


def run(*command: object) -> None:
    """Runs a command; what it says is shown only where it fails."""
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}")


def main() -> None:
    """Builds the wheels into OUT and prints their paths, a line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="a Python of 3.12 or later: its headers make a wheel too")
    parser.add_argument("--mlx", type=Path, help="mlx-metal's macOS wheel: builds _mlx too")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mlx = args.mlx and unpacked_mlx(args.mlx.resolve(), folder)
        pure = pure_part(folder)
        for python, its_mlx in [(sys.executable, mlx), (args.python, None)]:
            if python:
                installed, tag = compile_modules(folder, python, its_mlx)
                print(pack(pure, installed, f"{tag}-{PLATFORM}", out))


if __name__ == "__main__":
    main()
