"""What `pip install` gets: wheel and source archive hold the whole package and the GPU sources."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest
from scikit_build_core import build
from scikit_build_core.settings.skbuild_read_settings import SettingsReader

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
        for root in (folder, folder / "metal", folder / "cuda")  # rglob does not follow links
        for p in root.rglob("*")
        if p.is_file() and p.suffix not in skipped and p.name != "_mlx_built.py"
    }
    assert package == sources
    for kernels in ("metal", "cuda"):
        names = {p.name for p in (ROOT / kernels).iterdir()}
        inside = {n.rpartition("/")[2] for n in package if n.startswith(f"hadamoe/{kernels}/")}
        assert names == inside


def test_the_source_archive_builds_the_same_wheel(pure_wheel, pure_wheel_of, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    archive = tmp_path / build.build_sdist(str(tmp_path))
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    tree = tmp_path / archive.name.removesuffix(".tar.gz")
    assert pure_wheel_of(tree, tmp_path) == pure_wheel


def test_a_wheel_with_mlx_fits_one_python_and_one_mlx(monkeypatch):
    """MLX's own wheels have no stable ABI, and each patch release of MLX has another one."""
    read = SettingsReader.from_file
    monkeypatch.delenv("HM_MLX", raising=False)
    monkeypatch.delenv("HM_CUDA", raising=False)
    plain = read(ROOT / "pyproject.toml", state="wheel").settings
    assert (plain.wheel.py_api, plain.cmake.define) == ("cp312", {})
    monkeypatch.setenv("HM_MLX", "1")
    lazy = read(ROOT / "pyproject.toml", state="wheel").settings
    assert (lazy.wheel.py_api, lazy.cmake.define) == ("", {"HM_MLX": "ON"})
    tested = re.search(r"^mlx(==.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert {re.search("==[^;]+", r)[0] for r in lazy.build.requires} == {tested}


def test_a_build_may_bring_its_cuda_compiler(monkeypatch):
    read = SettingsReader.from_file
    monkeypatch.setenv("HM_MLX", "1")
    lazy = read(ROOT / "pyproject.toml", state="wheel").settings
    monkeypatch.setenv("HM_CUDA", "off")
    off = read(ROOT / "pyproject.toml", state="wheel").settings
    assert off.cmake.define == {"HM_MLX": "ON", "HM_CUDA": "off"}
    assert off.build.requires == lazy.build.requires
    monkeypatch.setenv("HM_CUDA", "pypi")
    pypi = read(ROOT / "pyproject.toml", state="wheel").settings
    assert pypi.cmake.define == {"HM_MLX": "ON", "HM_CUDA": "pypi"}
    # all that are pinned but NVRTC, which only a test of MLX's texts needs
    tested = re.findall(r"^nvidia-(?!cuda-nvrtc).+$", (ROOT / "constraints.txt").read_text(), re.M)
    assert sorted(set(pypi.build.requires) - set(lazy.build.requires)) == sorted(tested)


def test_metal_sources_lie_beside_the_imported_package():
    installed = Path(hadamoe.__file__).parent / "metal"
    assert {p.name for p in installed.iterdir()} == {p.name for p in (ROOT / "metal").iterdir()}
