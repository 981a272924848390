"""CUDA code nobody here wrote, run in the simulator: Marlin and AWQ as optimum-quanto ships them.

Their device code as it lies in the wheel (the host code, which asks for torch and a GPU, is cut
off): cp.async pipelines, ldmatrix, mma, lop3, half2 arithmetic, 96 KB of shared memory.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from simt import toolchain, wheels
from simt.cuda_kernel import compile_kernel

VERSION = "0.2.7"
FOLDER = "optimum/quanto/library/extensions/cuda"
FILES = ("awq/dequantize.cuh", "awq/v2/gemv_cuda.cu", "marlin/marlin_cuda_kernel.cu")
GROUP = 128

pytestmark = pytest.mark.skipif(bool(toolchain.missing()), reason=str(toolchain.missing()))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The folder of optimum-quanto's CUDA sources."""
    wheel = wheels.fetched("optimum-quanto", VERSION, "any")
    if wheel is None:
        pytest.skip("PyPI is out of reach: no optimum-quanto wheel")
    folder = tmp_path_factory.mktemp("quanto")
    with zipfile.ZipFile(wheel) as archive:
        for name in FILES:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(archive.read(f"{FOLDER}/{name}"))
    return folder


def device_code(path: Path, host: str) -> str:
    """A source up to its first line of host code, without the headers only that needs."""
    text = path.read_text()
    text = text[: text.index(host)]
    text += "#endif\n" * (len(re.findall(r"^#if", text, re.M)) - text.count("\n#endif"))
    return re.sub(r'^#include (<torch/.*>|"gemv_cuda.h")$', "", text, flags=re.M)


def weights(rows: int, columns: int):
    """4-bit codes, f16 scales and shifts per group of columns, and the numbers they stand for."""
    rng = np.random.default_rng(rows)
    codes = rng.integers(0, 16, (rows, columns))
    scales = rng.uniform(0.5, 1.5, (rows, columns // GROUP)).astype(np.float16)
    shifts = (-8 * scales).astype(np.float16)
    wide = [np.repeat(a, GROUP, 1).astype("f8") for a in (scales, shifts)]
    return codes, scales, shifts, codes * wide[0] + wide[1]


def awq_words(codes: np.ndarray) -> np.ndarray:
    """AWQ's order: rows in fours, columns in the order its dequantisation leaves them."""
    rows, columns = codes.shape
    spread = codes.reshape(rows, columns // 32, 4, 4, 2).transpose(0, 1, 3, 4, 2)
    strips = spread.reshape(rows // 4, 4, columns // 64, 64).transpose(0, 2, 1, 3)
    nibbles = strips.reshape(-1, 4) << 4 * np.arange(4)
    return nibbles.sum(1).astype(np.uint16).view(np.uint32)


@pytest.mark.parametrize("check", [False, True])
def test_awq_matvec(sources, check):
    rows, columns, tokens = 16, 1024, 2
    codes, scales, shifts, numbers = weights(rows, columns)
    x = np.random.default_rng(1).standard_normal((tokens, columns)).astype(np.float16)
    source = device_code(sources / FILES[1], "/*\nComputes GEMV (PyTorch interface)")
    kernel = compile_kernel(
        source, f"gemv_kernel<2, {tokens}, 256, {GROUP}>", [sources / "awq" / "v2"], check=check
    )
    y = np.zeros((tokens, rows), np.float16)
    stored = [awq_words(codes), scales.T.copy(), shifts.T.copy()]
    result = kernel(
        [x, *stored, y, columns, rows],
        grid=(rows // 8, 1, 1),
        block=(256, 1, 1),
        shared=8 * tokens * 2 * 4 * 4,
        outputs=[4],
        names=["x", "codes", "scales", "shifts", "y", "columns", "rows"],
    )
    assert not result.findings
    want = x.astype("f8") @ numbers.T
    assert np.abs(y - want).max() < 0.02 * np.abs(want).max()  # sums in f16
    if check:
        assert (
            result.traffic["codes"].unique_read == stored[0].nbytes == result.traffic["codes"].read
        )


def marlin_words(codes: np.ndarray) -> np.ndarray:
    """Marlin's order: 16x16 tiles, in each the order of mma's fragments, four tiles a step."""
    lane = np.arange(32)[:, None, None]
    row = 2 * (lane % 4) + np.array([0, 1, 8, 9])
    fragment = (16 * row + lane // 4 + 8 * np.arange(2)[:, None]).reshape(32, 8)
    order = (fragment[:, None] + 256 * np.arange(4)[:, None]).reshape(-1, 8)
    order = order[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
    rows, columns = codes.shape
    tiles = codes.T.reshape(columns // 16, 16, rows // 16, 16).transpose(0, 2, 1, 3)
    ordered = tiles.reshape(-1, 1024)[:, order].reshape(-1, 8).astype(np.uint32)
    return (ordered << 4 * np.arange(8, dtype=np.uint32)).sum(1, dtype=np.uint32)


def marlin_scales(scales: np.ndarray) -> np.ndarray:
    """Scales of 64 rows at a time, in the order of the fragments they multiply."""
    order = (np.arange(8)[:, None] + 8 * np.arange(8)).reshape(-1)
    return scales.T.reshape(-1, 64)[:, order].copy()


@pytest.mark.parametrize("check", [False, True])
def test_marlin(sources, check):
    rows, columns, tokens = 256, 256, 16
    codes, scales, shifts, numbers = weights(rows, columns)
    x = np.random.default_rng(1).standard_normal((tokens, columns)).astype(np.float16)
    source = device_code(sources / FILES[2], "#define CALL_IF")
    kernel = compile_kernel(source, f"Marlin<256, 1, 8, 8, 4, {GROUP // 16}>", check=check)
    y, locks = np.zeros((tokens, rows), np.float16), np.zeros(rows // 128 * 16, np.int32)
    stored = [marlin_words(codes), y, marlin_scales(scales), marlin_scales(shifts)]
    result = kernel(
        [x, *stored, tokens, rows, columns, locks],
        grid=(1, 1, 1),  # blocks wait for each other: one does all the work
        block=(256, 1, 1),
        shared=96 * 1024,
        outputs=[2],
        names=["x", "codes", "y", "scales", "shifts", "tokens", "rows", "columns", "locks"],
    )
    want = x.astype("f8") @ numbers.T
    assert np.abs(y - want).max() < 0.005 * np.abs(want).max()
    if check:
        assert result.traffic["codes"].unique_read == codes.size // 2
        # It reads ahead of its pipeline what is never used, and ends without a barrier between the
        # pipeline's last reads and the reduction in the same memory. Nothing lies outside a buffer.
        kinds = {f.kind for f in result.findings}
        assert kinds == {"uninitialised-read", "race-write-read", "race-read-write"}
        place = re.compile(r"frag_b_quant|sh_s_stage|sh_sz_stage|sh\[red_sh_wr\]|asm volatile")
        assert all(place.search(f.code) for f in result.findings), result.findings
