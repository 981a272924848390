"""jang's TurboQuant writes weights, signs and codebooks; we read them as they are."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest

from hadamoe import Instance, Rotation, ops
from hadamoe.weight import Part

from .support import check_product, check_values, raw, weight_of

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
with contextlib.redirect_stdout(io.StringIO()):  # greets on import
    pytest.importorskip("jang_tools", reason="jang is not installed (pip install 'hadamoe[test]')")
    from jang_tools.turboquant import codebook, linear, pipeline, rotation


def decoded(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """jang's own reading of packed codes."""
    rows = [pipeline.unpack_bits(mx.array(row), bits, columns) for row in packed]
    return np.array(mx.stack(rows)).astype(np.int64)


@pytest.mark.parametrize("columns", [128, 512, 768, 2048])
@pytest.mark.parametrize("bits", [2, 4])
def test_weight(bits, columns):
    rng = np.random.default_rng(columns + bits)
    w = rng.standard_normal((16, columns)).astype("f4")
    made = linear.tq_quantize_weight(w, bits, seed=42)
    book = np.array(codebook.compute_codebook(columns, bits), np.float32)
    signs = np.array(rotation.generate_random_signs(columns, seed=42)).astype("f4")
    norms = made["norms"].view(np.uint16).reshape(-1, 1)
    inst = Instance("codebook", bits, "f16")
    part = Part(inst, len(w), columns, raw(made["packed"]), norms, None, book)
    stored = weight_of(part, columns)

    peer = book[decoded(made["packed"], bits, columns)].astype(np.float64)
    peer *= made["norms"].astype(np.float64)[:, None]
    check_values(stored, peer, roundings=1)

    # the rotation: their rotated input times the stored rows, and their inverse on the weights
    x = rng.standard_normal((3, columns)).astype("f4")
    theirs = np.array(rotation.hadamard_rotate(mx.array(x), mx.array(signs)))
    ours = ops.hadamard(x, pre=signs)
    steps = columns.bit_length() + 3
    assert np.abs(ours - theirs).max() <= steps * 2.0**-23 * np.abs(x).sum(-1).max() / 8
    check_product(stored, peer, ours)
    back = np.array(rotation.hadamard_inverse(mx.array(peer.astype("f4")), mx.array(signs)))
    rotated = weight_of(part, columns, Rotation(None, pre=signs))
    largest = np.abs(peer).sum(-1).max() / 8
    assert np.abs(ops.dequantize(rotated) - back).max() <= steps * 2.0**-23 * largest
