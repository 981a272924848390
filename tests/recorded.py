"""Test data: complete checkpoints written by the formats' own tools, and recorded arrays.

What every framework's model is held against: `LOGITS`, and `CONTINUATIONS` of prompts.
"""

from __future__ import annotations

import functools
import json
import re
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
#: checkpoint -> (token ids, f32 logits of one forward, f32 logits from a cache or None)
LOGITS = {
    "configi_tiny": ("tokens", "logits_f32", "logits_decode_f32"),
    "mxfp4_node_tiny": ("tokens", "logits_f32", "logits_decode_f32"),
    "jangtq_tiny": ("input_ids", "logits_hf_fp32_exact", None),
    "tqvllm_tiny": ("ids40", "logits40_hf_f32_tiny", None),
    "w4a16_tiny": ("input_ids", "logits_fp32_wexact", "logits_decode_fp32_wexact"),
    **{name: ("input_ids", "logits_f32", None) for name in STDLIB},
}
#: position of the first recorded logits from a cache, where not the first
DECODE_FROM = {"w4a16_tiny": 31}
#: of LOGITS, largest difference allowed
TOLERANCE = 1e-4
#: checkpoint -> prompt -> its greedy continuation
CONTINUATIONS = json.loads((GOLDEN / "stdlib_continuations.json").read_text())


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


def logits(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(token ids i64, logits f32, logits from a cache or None) of a checkpoint in `LOGITS`."""
    arrays = golden(f"{name}_logits")
    ids, whole, decode = LOGITS[name]
    return arrays[ids].astype(np.int64), arrays[whole], arrays[decode] if decode else None


def mapped_pages(folder: Path) -> int:
    """Bytes of this folder's mapped files that are in memory; Linux."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = str(folder) in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def forget() -> None:
    """Remove what `checkpoint` extracted."""
    if _extracted.cache_info().currsize:
        shutil.rmtree(_extracted(), ignore_errors=True)
