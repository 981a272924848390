"""What `pip install` gets: wheel and source archive hold the whole package, Metal sources too."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest
from scikit_build_core import build

import hadamoe

ROOT = Path(__file__).resolve().parent.parent.parent
#: The wheel without its compiled module: what is checked here needs no compiler.
PURE = {"wheel.cmake": "false", "wheel.py-api": ""}


def pure_wheel(tree: Path, folder: Path) -> dict[str, bytes]:
    """The package's files in the wheel of a source tree."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tree)
        path = folder / build.build_wheel(str(folder), PURE)
    with zipfile.ZipFile(path) as wheel:
        return {n: wheel.read(n) for n in wheel.namelist() if ".dist-info/" not in n}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> dict[str, bytes]:
    return pure_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_every_source_of_the_package(wheel):
    package = ROOT / "python" / "hadamoe"
    skipped = {".so", ".pyc"}
    sources = {
        f"hadamoe/{p.relative_to(package)}": p.read_bytes()
        for folder in (package, package / "metal")  # rglob does not follow the link
        for p in folder.rglob("*")
        if p.is_file() and p.suffix not in skipped
    }
    assert wheel == sources
    metal = {p.name for p in (ROOT / "metal").iterdir()}
    assert metal == {n.rpartition("/")[2] for n in wheel if n.startswith("hadamoe/metal/")}


def test_the_source_archive_builds_the_same_wheel(wheel, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    archive = tmp_path / build.build_sdist(str(tmp_path))
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    assert pure_wheel(tmp_path / archive.name.removesuffix(".tar.gz"), tmp_path) == wheel


def test_metal_sources_lie_beside_the_imported_package():
    installed = Path(hadamoe.__file__).parent / "metal"
    assert {p.name for p in installed.iterdir()} == {p.name for p in (ROOT / "metal").iterdir()}
