"""What every launch of the model's products needs of a GPU: threads, threadgroup memory, text.

Plans alone, nothing runs. MLX hashes a kernel's text at every launch, 1 us for 8 KB.
"""

from __future__ import annotations

import numpy as np
import pytest

from hadamoe import Rotation, metal_plan
from hadamoe import metal_products as plans
from hadamoe.errors import UnsupportedError
from hadamoe.gpu_weight import ROTATED, GpuWeight

SIGNS = np.ones(128, np.float32)
#: table << 16 | bits << 8 | scale, and group / 32 above bit 25: what the formats' matrices are.
KINDS = {
    "affine8": 2 << 25 | 0 << 16 | 8 << 8 | 2,
    "affine4": 2 << 25 | 0 << 16 | 4 << 8 | 2,
    "int4": 4 << 25 | 1 << 16 | 4 << 8 | 2,
    "mxfp4": 1 << 25 | 2 << 16 | 4 << 8 | 3,
    "gguf": 1 << 25 | 3 << 16 | 4 << 8 | 3,
    "bf16": 5 << 16 | 16 << 8 | 2,
}
TURNED = {f"tq{bits}": 4 << 16 | bits << 8 | ROTATED for bits in (2, 3, 4)}
#: (rows of the parts, columns): q k v; qkv z b a; o and out; the head.
SHAPES = [
    ((8192, 512, 512), 2048),
    ((8192, 4096, 32, 32), 2048),
    ((2048,), 4096),
    ((248320,), 2048),
]


def weight(kind: int, rows: tuple[int, ...], columns: int) -> GpuWeight:
    parts = np.zeros((1, len(rows), 8), np.uint32)
    parts[0, :, 0], parts[..., 1] = rows, kind
    turn = Rotation(128, SIGNS, SIGNS) if kind & ROTATED else None
    words = np.zeros(0, np.uint32)
    return GpuWeight(words, parts, (kind,), sum(rows), columns, columns, turn)


def text(launch: metal_plan.Launch) -> int:
    return len(metal_plan.source(launch.file)) + len(launch.body)


@pytest.mark.parametrize("tokens", [1, 4, 8, 300])
@pytest.mark.parametrize(("rows", "columns"), SHAPES, ids=str)
@pytest.mark.parametrize("name", [*KINDS, *TURNED])
def test_products(name, rows, columns, tokens):
    kind = {**KINDS, **TURNED}[name]
    w = weight(kind, rows, columns)
    norm = 1e-6 if columns == 2048 else None
    options = {"norm": norm, "rotate": name in TURNED, "residual": norm is None}
    steps = plans.product(tokens, w, "float32", **options)
    for launch, _ in steps:
        assert launch.threads <= 256
        assert sum(4 * count for _, count in launch.shared) <= 16384
        # a rotation inside is 3 KB more, less than another launch costs
        assert text(launch) < (11776 if launch.kernel == "qmatvec_rotated" else 8192)
    assert len(steps) == (1 if tokens == 1 else 1 + (name in TURNED or (tokens > 8 and bool(norm))))


def test_a_norm_of_long_rows_is_refused():
    w = weight(TURNED["tq4"], (64,), 8192)
    with pytest.raises(UnsupportedError, match="a norm of 8192 columns, on Metal 4096 at most"):
        plans.product(1, w, "float32", norm=1e-6, rotate=True)


@pytest.mark.parametrize("name", [*KINDS, *TURNED])
def test_rows_and_largest(name):
    w = weight({**KINDS, **TURNED}[name], (248320,), 2048)
    launches = [plans.dequantize(3, w, "float32"), *plans.largest(1, w.rows, 64)]
    for launch in launches:
        assert launch.threads <= 256
        assert sum(4 * count for _, count in launch.shared) <= 16384
        assert text(launch) < 8192
