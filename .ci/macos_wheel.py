"""The wheel for Macs with Apple silicon, built on Linux.

    python .ci/macos_wheel.py [--python PYTHON] [--mlx MLX_METAL_WHEEL] OUT

Needs, from PyPI, cmake, nanobind, ninja, packaging, scikit-build-core and ziglang (the compiler:
clang with Apple's headers). CPython's headers are those of PYTHON, this interpreter
unless told; from 3.12 on the wheel serves every later version too. With MLX's own macOS wheel the
module `_mlx` comes along, for that one MLX and that one Python.
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
from packaging.utils import parse_wheel_filename
from scikit_build_core.build import build_wheel

ROOT = Path(__file__).resolve().parent.parent
OLDEST_MACOS = "14.0"  # MLX's own
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


def compile_modules(folder: Path, python: str, mlx: Path | None) -> tuple[Path, str, str]:
    """The compiled modules, in an installed tree, and the tags of Python and ABI."""
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
    }
    if stable:
        define |= {"SKBUILD_SABI_COMPONENT": "Development.SABIModule", "SKBUILD_SOSABI": "abi3"}
    if mlx:
        define |= {"HM_MLX": "ON", "MLX_DIR": unpacked_mlx(mlx, folder) / "share/cmake/MLX"}
    os.environ["ZIG_GLOBAL_CACHE_DIR"] = os.environ["ZIG_LOCAL_CACHE_DIR"] = str(folder / "zig")
    options = [f"-D{name}={value}" for name, value in define.items()]
    cmake = [sys.executable, "-m", "cmake"]
    run(*cmake, "-S", ROOT, "-B", folder / "build", "-G", "Ninja", *options)
    run(*cmake, "--build", folder / "build")
    run(*cmake, "--install", folder / "build", "--prefix", folder / "installed")
    tag = f"cp{major}{minor}"
    return folder / "installed", tag, "abi3" if stable else tag


def unpacked_mlx(wheel: Path, folder: Path) -> Path:
    """MLX's headers and library; `_mlx` is compiled for the MLX that this Python has."""
    version = str(parse_wheel_filename(wheel.name)[1])
    installed = subprocess.check_output([sys.executable, "-m", "mlx", "--version"], text=True)
    if installed.strip() != version:
        sys.exit(f"{wheel.name}: this Python has mlx {installed.strip()}, needs the same")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "mlx")
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
    """Builds one wheel into OUT and prints its path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="whose headers; default: this one")
    parser.add_argument("--mlx", type=Path, help="mlx-metal's macOS wheel: builds _mlx, too")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    out, mlx = args.out.resolve(), args.mlx and args.mlx.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        pure = pure_part(Path(name))
        installed, python, abi = compile_modules(Path(name), args.python, mlx)
        platform = f"macosx_{OLDEST_MACOS.replace('.', '_')}_arm64"
        print(pack(pure, installed, f"{python}-{abi}-{platform}", out))


if __name__ == "__main__":
    main()
