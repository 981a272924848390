"""Wheels for other machines, fetched from PyPI at test time and cached; none is committed."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

from . import toolchain

METALLIB = "mlx/lib/mlx.metallib"
SECONDS = 300


@cache
def fetched(project: str, version: str, platform: str) -> Path | None:
    """The wheel of ``project`` for ``platform``, or None where PyPI is out of reach."""
    try:
        return toolchain.cached(
            [project, version, platform],
            lambda path: download(f"{project}=={version}", platform, path),
            ".whl",
        )
    except (subprocess.SubprocessError, OSError):
        return None


def download(requirement: str, platform: str, target: Path) -> None:
    """Writes the wheel that pip finds to ``target``."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder]
        command += ["--only-binary=:all:", "--platform", platform, requirement]
        subprocess.run(command, timeout=SECONDS, check=True, capture_output=True)
        (wheel,) = Path(folder).iterdir()
        os.replace(wheel, target)


@cache
def metallib() -> bytes | None:
    """Apple's compilation of the installed MLX's kernels, or None where PyPI is out of reach."""
    wheel = fetched("mlx-metal", importlib.metadata.version("mlx"), "macosx_15_0_arm64")
    if wheel is None:
        return None
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(METALLIB)
