"""The wheel without its compiled modules: what every platform shares."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from scikit_build_core import build

ROOT = Path(__file__).resolve().parent.parent.parent
SETTINGS = {"wheel.cmake": "false", "wheel.py-api": ""}


def build_pure_wheel(tree: Path, folder: Path) -> dict[str, bytes]:
    """Every file of the wheel of a source tree; needs no compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tree)
        path = folder / build.build_wheel(str(folder), SETTINGS)
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


@pytest.fixture(scope="session")
def pure_wheel_of():
    """The function `build_pure_wheel`."""
    return build_pure_wheel


@pytest.fixture(scope="session")
def pure_wheel(tmp_path_factory) -> dict[str, bytes]:
    """The files of this tree's."""
    return build_pure_wheel(ROOT, tmp_path_factory.mktemp("wheel"))
