"""The macOS wheel, built here and read byte by byte: what a Mac's loader would refuse fails here.

No Mac takes part. Every symbol is looked up where a Mac would find it, the signature's hashes are
compared with the pages they sign, and pip installs the wheel for the platform its name claims.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import macho
import pytest
import ziglang
from abi3info import DATAS, FUNCTIONS
from abi3info.models import PyVersion
from packaging.utils import parse_wheel_filename
from simt import wheels

ROOT = Path(__file__).resolve().parent.parent.parent
SYSTEM, CXX = "/usr/lib/libSystem.B.dylib", "/usr/lib/libc++.1.dylib"
#: Wheels whose authors built them on a Mac, for a macOS no newer than ours.
PUBLISHED = {
    "contourpy": "1.3.3",
    "sentencepiece": "0.2.3",
    "rapidfuzz": "3.14.6",
    "mlx": version("mlx"),
    "mlx-metal": version("mlx"),
}
MLX = "@rpath/libmlx.dylib"
#: What libc++ has that these do not use: duckdb's wheel for macOS 11 uses the first three; the next
#: two lie beside what they do use (a class's other destructor, the type beside its table); the last
#: is in libc++'s list of what its first ABI compiles in (__string/extern_template_lists.h).
ALSO_IN_CXX = {
    "__ZNSt3__15mutex8try_lockEv",
    "__ZNSt3__19to_stringEd",
    "__ZNSt3__19to_stringEx",
    "__ZNSt16invalid_argumentD2Ev",
    "__ZTINSt3__112system_errorE",
    "__ZNSt3__112basic_stringIcNS_11char_traitsIcEENS_9allocatorIcEEE21__grow_by_and_replaceE"
    "mmmmmmPKc",
}


@dataclass
class Built:
    """One wheel, its files and the interpreter whose headers it was built with."""

    path: Path
    python: str
    files: dict[str, bytes]

    @property
    def stable(self) -> bool:
        """Whether it serves every Python from 3.12 on; only the other has `_mlx`."""
        return "-abi3-" in self.path.name

    @property
    def modules(self) -> dict[str, bytes]:
        """The compiled modules by file name."""
        return {Path(n).name: data for n, data in self.files.items() if n.endswith(".so")}


@cache
def newer_python() -> str | None:
    """A Python of 3.12 or later that has its headers."""
    ask = "import sysconfig; print(sysconfig.get_path('include'))"
    installations = Path(sys.base_prefix).parent  # pyenv's and uv's are side by side
    for minor in range(12, 20):
        name = f"python3.{minor}"
        for path in filter(None, (shutil.which(name), *installations.glob(f"*/bin/{name}"))):
            done = subprocess.run([path, "-c", ask], capture_output=True, text=True)
            if done.returncode == 0 and Path(done.stdout.strip(), "Python.h").exists():
                return str(path)
    return None


@cache
def fetched(project: str) -> Path:
    """The macOS wheel of a project on PyPI."""
    wheel = wheels.fetched(project, PUBLISHED[project], "macosx_14_0_arm64")
    if wheel is None:
        pytest.skip(f"PyPI is out of reach: the macOS wheel of {project} {PUBLISHED[project]}")
    return wheel


@pytest.fixture(scope="module")
def every_wheel(tmp_path_factory) -> dict[str, Built]:
    """One run of the script: this Python's wheel with `_mlx`, and a newer one's where there is."""
    out = tmp_path_factory.mktemp("macos")
    command = [sys.executable, ROOT / ".ci" / "macos_wheel.py", "--mlx", fetched("mlx-metal"), out]
    command += ["--python", newer_python()] if newer_python() else []
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for line, python in zip(done.stdout.split(), (sys.executable, newer_python()), strict=False):
        with zipfile.ZipFile(line) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        found["stable" if python != sys.executable else "this"] = Built(Path(line), python, files)
    return found


@pytest.fixture(params=["this", "stable"] if newer_python() else ["this"])
def built(request, every_wheel) -> Built:
    return every_wheel[request.param]


def test_pip_takes_it_for_macs_and_nothing_else(built, tmp_path):
    _, _, _, tags = parse_wheel_filename(built.path.name)
    assert [tag.platform for tag in tags] == ["macosx_14_0_arm64"]
    newer = "3.13" if built.stable else f"3.{sys.version_info[1]}"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary=:all:"]
    pip += ["--python-version", newer, "--implementation", "cp", "--target", str(tmp_path)]
    for platform, taken in {
        "macosx_14_0_arm64": True,
        "macosx_15_0_arm64": True,
        "macosx_13_0_arm64": False,
        "macosx_14_0_x86_64": False,
        "manylinux2014_aarch64": False,
    }.items():
        command = [*pip, "--upgrade", "--platform", platform, str(built.path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode == 0) == taken, f"{platform}\n{done.stderr}"


def test_only_the_compiled_modules_differ_from_other_wheels(built, pure_wheel):
    names = {n for n in pure_wheel if not n.endswith((".dist-info/WHEEL", ".dist-info/RECORD"))}
    assert {name: built.files[name] for name in names} == {n: pure_wheel[n] for n in names}
    own = darwin()
    added = {"_cpu.abi3.so"} if built.stable else {f"_cpu.{own}", f"_mlx.{own}", "_mlx_built.py"}
    assert built.files.keys() - pure_wheel.keys() == {f"hadamoe/{name}" for name in added}


def test_the_record_is_right(built):
    (info,) = {name.split("/")[0] for name in built.files if ".dist-info/" in name}
    record = {row[0]: row[1:] for row in csv.reader(text(built, f"{info}/RECORD").splitlines())}
    assert record.pop(f"{info}/RECORD") == ["", ""]
    for name, data in built.files.items():
        if name != f"{info}/RECORD":
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            assert record.pop(name) == [f"sha256={digest}", str(len(data))]
    assert not record
    tag = built.path.stem.split("-", 2)[2]
    assert set(text(built, f"{info}/WHEEL").splitlines()) >= {
        "Root-Is-Purelib: false",
        f"Tag: {tag}",
    }


def darwin() -> str:
    """The end of the name of a module for this version of Python on a Mac."""
    return f"cpython-3{sys.version_info[1]}-darwin.so"


def text(built: Built, name: str) -> str:
    return built.files[name].decode()


def test_modules_load_on_every_mac_the_tag_names(built):
    for name, data in built.modules.items():
        found = macho.read(data)
        assert found.filetype == macho.DYLIB
        assert found.oldest_macos == (14, 0)
        assert found.install_name == name
        stem = name.split(".")[0]
        mlx = ([MLX], ["@loader_path/../mlx/lib"]) if stem == "_mlx" else ([], [])
        assert (found.libraries, found.rpaths) == ([SYSTEM, CXX, *mlx[0]], mlx[1])
        assert found.offers - {"__mh_dylib_header", "___dso_handle"} == {f"_PyInit_{stem}"}


def test_every_page_is_signed(built):
    for data in built.modules.values():
        assert macho.check_signature(macho.read(data), data) == -(-len(data) // 16384)
        torn = bytearray(data)
        torn[len(data) // 2] ^= 1
        with pytest.raises(macho.BadMachO, match="differs from its hash"):
            macho.check_signature(macho.read(bytes(torn)), bytes(torn))


def test_no_path_of_this_machine_is_inside(built):
    for data in built.modules.values():
        for path in (ROOT, Path.home(), sys.prefix, sys.base_prefix, "/tmp/", "/usr/include"):
            assert str(path).encode() not in data


def test_every_symbol_is_somewhere_on_a_mac(built):
    for data in built.modules.values():
        assert unresolved(macho.read(data), built) == set()


def test_a_symbol_that_no_mac_has_is_found(built):
    for data in built.modules.values():
        for real, planted in [
            (b"_strcmp\0", b"_strcmq\0"),
            (b"_PyErr_SetString\0", b"_PyErr_SetStrong\0"),
            (b"__ZSt9terminatev\0", b"__ZSt9terminatiw\0"),
            (b"__ZN3mlx4core8moveaxis", b"__ZN3mlx4core8moveaxle"),
        ]:
            missing = unresolved(macho.read(data.replace(real, planted)), built)
            assert len(missing) == (real in data)
            assert all(name.encode().startswith(planted.rstrip(b"\0")) for name in missing)


def test_arrays_pass_between_our_module_and_mlx(every_wheel):
    """nanobind shares types between modules whose tags, which name its ABI, are the same."""
    tags = set()
    with zipfile.ZipFile(fetched("mlx")) as archive:
        files = [archive.read(n) for n in archive.namelist() if n.endswith(".so")]
    for data in (*files, every_wheel["this"].modules[f"_mlx.{darwin()}"]):
        assert b"\0mlx\0" in data
        tags |= set(re.findall(rb"nanobind_system[a-z0-9_]*", data))
    assert len(tags) == 1


def unresolved(found: macho.MachO, built: Built) -> set[str]:
    """Undefined symbols that the library they name, or Python, does not have."""
    by_library: dict[str | None, set[str]] = {}
    for name, library in found.needs.items():
        by_library.setdefault(library, set()).add(name)
    missing = by_library.pop(SYSTEM) - system_symbols() - {"dyld_stub_binder"}  # dyld's own
    missing |= by_library.pop(CXX) - cxx_symbols()
    missing |= not_in_python(by_library.pop(None), built)
    if MLX in by_library:
        missing |= by_library.pop(MLX) - mlx_symbols()
    assert not by_library
    return missing


def system_symbols() -> set[str]:
    """What libSystem exports: Apple's list, as ziglang ships it."""
    folder = Path(ziglang.__file__).parent / "lib" / "libc" / "darwin"
    lists = re.findall(r"symbols:\s*\[([^]]*)]", (folder / "libSystem.tbd").read_text())
    return {name.strip(" '\n") for names in lists for name in names.split(",")}


@cache
def cxx_symbols() -> set[str]:
    """What other people's modules take from libc++ (a Mac's own has more)."""
    found = set(ALSO_IN_CXX)
    for project in PUBLISHED:
        with zipfile.ZipFile(fetched(project)) as archive:
            for name in archive.namelist():
                if name.endswith((".so", ".dylib")):
                    needs = macho.read(archive.read(name)).needs
                    found |= {symbol for symbol, library in needs.items() if library == CXX}
    return found


@cache
def mlx_symbols() -> set[str]:
    """What MLX's own library offers."""
    with zipfile.ZipFile(fetched("mlx-metal")) as archive:
        return macho.read(archive.read("mlx/lib/libmlx.dylib")).offers


def not_in_python(symbols: set[str], built: Built) -> set[str]:
    """Symbols that the interpreter lacks or, in a stable module, that Python does not promise."""
    ask = (
        "import ctypes, json, sys;"
        "print(json.dumps([s for s in json.load(sys.stdin) if not hasattr(ctypes.pythonapi, s)]))"
    )
    plain = json.dumps([name.removeprefix("_") for name in symbols])
    answer = subprocess.check_output([built.python, "-c", ask], input=plain, text=True)
    missing = {f"_{name}" for name in json.loads(answer)}
    if built.stable:
        promised = {
            f"_{symbol.name}"
            for symbol, entry in (FUNCTIONS | DATAS).items()
            if entry.added <= PyVersion(3, 12)
        }
        missing |= symbols - promised
    return missing


def test_a_torn_file_is_an_error(built):
    """The reader checks sizes: a file cut anywhere raises `BadMachO`, nothing else."""
    data = next(iter(built.modules.values()))
    for size in (*range(0, 4096, 7), *range(4096, len(data), 65537)):
        with pytest.raises(macho.BadMachO):
            macho.check_signature(macho.read(data[:size]), data[:size])
