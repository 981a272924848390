"""Test data: complete checkpoints written by the formats' own tools, and recorded arrays."""

from __future__ import annotations

import functools
import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
EXAMPLES = ROOT / "examples" / "checkpoints"

#: Tiny random models, packed; and one trained model in six formats, plain directories.
TINY = ("configi_tiny", "jangtq_tiny", "mxfp4_node_tiny", "tqvllm_tiny", "w4a16_tiny")
STDLIB = tuple(f"stdlib_{f}" for f in ("bf16", "configi", "jangtq2", "mxfp4", "tq_apex2", "w4a16"))


@functools.cache
def _extracted() -> Path:
    return Path(tempfile.mkdtemp(prefix="hadamoe-tests-"))


@functools.cache
def checkpoint(name: str) -> Path:
    """Directory of a checkpoint in `TINY` or `STDLIB`; shared, do not write to it."""
    if (EXAMPLES / name).is_dir():
        return EXAMPLES / name
    with tarfile.open(GOLDEN / "checkpoints" / f"{name}.tar.xz") as tar:
        tar.extractall(_extracted(), filter="data")
    return _extracted() / name


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    """Arrays of ``NAME.npz``, looked up under tests/golden, its checkpoints and the examples."""
    for folder in (GOLDEN, GOLDEN / "checkpoints", EXAMPLES):
        if (folder / f"{name}.npz").is_file():
            with np.load(folder / f"{name}.npz", allow_pickle=False) as z:
                return {k: z[k] for k in z.files}
    raise FileNotFoundError(f"no {name}.npz in tests/golden or examples/checkpoints")


def forget() -> None:
    """Remove what `checkpoint` extracted."""
    if _extracted.cache_info().currsize:
        shutil.rmtree(_extracted(), ignore_errors=True)
