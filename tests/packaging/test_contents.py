"""What `pip install` gets: wheel and source archive hold the whole package, Metal sources too."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from scikit_build_core import build

import hadamoe

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def package(pure_wheel) -> dict[str, bytes]:
    """The package's files in the wheel."""
    return {name: data for name, data in pure_wheel.items() if name.startswith("hadamoe/")}


def test_the_wheel_holds_every_source_of_the_package(package):
    folder = ROOT / "python" / "hadamoe"
    skipped = {".so", ".pyc"}
    sources = {
        f"hadamoe/{p.relative_to(folder)}": p.read_bytes()
        for root in (folder, folder / "metal")  # rglob does not follow the link
        for p in root.rglob("*")
        if p.is_file() and p.suffix not in skipped and p.name != "_mlx_built.py"
    }
    assert package == sources
    metal = {p.name for p in (ROOT / "metal").iterdir()}
    assert metal == {n.rpartition("/")[2] for n in package if n.startswith("hadamoe/metal/")}


def test_the_source_archive_builds_the_same_wheel(pure_wheel, pure_wheel_of, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    archive = tmp_path / build.build_sdist(str(tmp_path))
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    tree = tmp_path / archive.name.removesuffix(".tar.gz")
    assert pure_wheel_of(tree, tmp_path) == pure_wheel


def test_metal_sources_lie_beside_the_imported_package():
    installed = Path(hadamoe.__file__).parent / "metal"
    assert {p.name for p in installed.iterdir()} == {p.name for p in (ROOT / "metal").iterdir()}
