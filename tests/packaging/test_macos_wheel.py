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
}
#: What libc++ has that these do not use. duckdb's wheel for macOS 11 uses the first three; the
#: others are compiled into libc++ beside what they do use: a class's other destructor, a class's
#: type beside its table.
ALSO_IN_CXX = {
    "__ZNSt3__15mutex8try_lockEv",
    "__ZNSt3__19to_stringEd",
    "__ZNSt3__19to_stringEx",
    "__ZNSt16invalid_argumentD2Ev",
    "__ZTINSt3__112system_errorE",
}


@dataclass
class Built:
    """One wheel, its files and the interpreter whose headers it was built with."""

    path: Path
    python: str
    files: dict[str, bytes]

    @property
    def stable(self) -> bool:
        return "-abi3-" in self.path.name

    @property
    def modules(self) -> dict[str, bytes]:
        return {name: data for name, data in self.files.items() if name.endswith(".so")}


@cache
def pythons() -> dict[str, str]:
    """This interpreter and, where one of 3.12 or later has its headers here, that one too."""
    ask = "import sysconfig; print(sysconfig.get_path('include'))"
    installations = Path(sys.base_prefix).parent  # pyenv's and uv's are side by side
    for minor in range(12, 20):
        name = f"python3.{minor}"
        for path in filter(None, (shutil.which(name), *installations.glob(f"*/bin/{name}"))):
            done = subprocess.run([path, "-c", ask], capture_output=True, text=True)
            if done.returncode == 0 and Path(done.stdout.strip(), "Python.h").exists():
                return {"this": sys.executable, "stable": str(path)}
    return {"this": sys.executable}


@pytest.fixture(scope="module", params=pythons())
def built(request, tmp_path_factory) -> Built:
    python = pythons()[request.param]
    out = tmp_path_factory.mktemp("macos")
    command = [sys.executable, str(ROOT / ".ci" / "macos_wheel.py"), "--python", python, str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    with zipfile.ZipFile(path) as archive:
        return Built(path, python, {name: archive.read(name) for name in archive.namelist()})


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
    assert len(built.files) == len(pure_wheel) + len(built.modules)
    suffix = "abi3" if built.stable else f"cpython-3{sys.version_info[1]}-darwin"
    assert set(built.modules) == {f"hadamoe/_cpu.{suffix}.so"}


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


def text(built: Built, name: str) -> str:
    return built.files[name].decode()


def test_modules_load_on_every_mac_the_tag_names(built):
    for name, data in built.modules.items():
        found = macho.read(data)
        assert found.filetype == macho.DYLIB
        assert found.oldest_macos == (14, 0)
        assert (found.libraries, found.rpaths) == ([SYSTEM, CXX], [])
        assert found.install_name == Path(name).name
        stem = Path(name).name.split(".")[0]
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
        for path in (ROOT, Path.home(), Path(sys.prefix), Path("/tmp"), Path("/usr/include")):
            assert str(path).encode() not in data


def test_every_symbol_is_somewhere_on_a_mac(built):
    for data in built.modules.values():
        assert unresolved(macho.read(data), built) == set()


def test_a_symbol_that_no_mac_has_is_found(built):
    for data in built.modules.values():
        for real, planted in [
            (b"_pthread_atfork\0", b"_pthread_atfxxx\0"),
            (b"_PyErr_SetString\0", b"_PyErr_SetStrong\0"),
            (b"__ZSt9terminatev\0", b"__ZSt9terminatiw\0"),
        ]:
            changed = macho.read(data.replace(real, planted))
            assert unresolved(changed, built) == {planted[:-1].decode()}


def unresolved(found: macho.MachO, built: Built) -> set[str]:
    """Undefined symbols that the library they name, or Python, does not have."""
    by_library: dict[str | None, set[str]] = {}
    for name, library in found.needs.items():
        by_library.setdefault(library, set()).add(name)
    missing = by_library.pop(SYSTEM) - system_symbols() - {"dyld_stub_binder"}  # dyld's own
    missing |= by_library.pop(CXX) - cxx_symbols()
    missing |= not_in_python(by_library.pop(None), built)
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
    for project, release in PUBLISHED.items():
        wheel = wheels.fetched(project, release, "macosx_14_0_arm64")
        if wheel is None:
            pytest.skip(f"PyPI is out of reach: the macOS wheel of {project} {release}")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(".so"):
                    needs = macho.read(archive.read(name)).needs
                    found |= {symbol for symbol, library in needs.items() if library == CXX}
    return found


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
    (data,) = built.modules.values()
    for size in (*range(0, 4096, 7), *range(4096, len(data), 65537)):
        with pytest.raises(macho.BadMachO):
            macho.check_signature(macho.read(data[:size]), data[:size])
