"""Packed weights as the Metal kernels read them: one array of words and a table of parts.

A GPU reads 16 bytes at a time and binds whole buffers, so a weight's arrays are copied once, side
by side, each at a multiple of 16 bytes. Codes stay the checkpoint's own bits; only rows whose
length is no multiple of 16 bytes get room behind them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .packed import PackedWeight, instances
from .weight import Rotation

#: Numbers of a part in the table, metal/weight.metal.
FIELDS = 8
_NONE = 0xFFFFFFFF
_ROTATED = 1 << 24
_TABLES = ("linear", "linear_signed", "e2m1", "e2m1_gguf", "codebook", "plain")
_SCALES = ("f32", "f16", "bf16", "e8m0")
_SCALE_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "e8m0": 1}


@dataclass(frozen=True, slots=True)
class MetalWeight:
    """One or more packed weights that read the same input, as one.

    Attributes:
        words: u32 ``[n]``: codes, scales, biases and codebooks, each at a multiple of 16 bytes.
        parts: u32 ``[experts, parts, 8]``: rows, kind, group, words from row to row, places of
            codes, scale, bias, codebook in units of 16 bytes.
        kinds: the different kinds of its parts.
        rows: of one expert.
        columns: k of the (padded) matrix.
        in_features: columns of the matrix before padding.
        rotation: what the parts marked as rotated read x through.
    """

    words: np.ndarray
    parts: np.ndarray
    kinds: tuple[int, ...]
    rows: int
    columns: int
    in_features: int
    rotation: Rotation | None

    @property
    def experts(self) -> int:
        return self.parts.shape[0]


def metal_weight(*weights: PackedWeight) -> MetalWeight:
    """Weights side by side: rows of the first, then of the second, and so on.

    Their experts, columns before padding and rotations (of those that have one) must agree, which
    `hadamoe.roles` has checked.
    """
    turned = next((w for w in weights if w.rotation is not None), weights[0])
    words = _Words()
    table = []
    for e in range(weights[0].experts):
        for w in weights:
            rotated = _ROTATED if w.rotation is not None else 0
            table += [_part(words, w, part, rotated) for part in w.parts[e] if part[0]]
    parts = np.array(table, np.uint32).reshape(weights[0].experts, -1, FIELDS)
    kinds = tuple(int(k) for k in np.unique(parts[..., 1] & (_ROTATED - 1)))
    rows = sum(w.rows for w in weights)
    return MetalWeight(
        words.joined(), parts, kinds, rows, turned.columns, turned.in_features, turned.rotation
    )


class _Words:
    """Arrays laid side by side, each once."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._known: dict[tuple[int, int, int], int] = {}
        self._end = 0

    def place(self, buffer: np.ndarray, offset: int, rows: int, row_bytes: int) -> int:
        """Where ``rows`` rows of ``row_bytes`` bytes are, in units of 16 bytes; rows padded."""
        key = (buffer.__array_interface__["data"][0] + offset, rows, row_bytes)
        if key not in self._known:
            stride = -(-row_bytes // 16) * 16
            data = buffer[offset : offset + rows * row_bytes].reshape(rows, row_bytes)
            self._known[key] = self._end // 16
            self._arrays.append(np.pad(data, [(0, 0), (0, stride - row_bytes)]).reshape(-1))
            self._end += rows * stride
        return self._known[key]

    def joined(self) -> np.ndarray:
        # a kernel's last piece may reach behind the last row
        return np.concatenate([*self._arrays, np.zeros(128, np.uint8)]).view(np.uint32)


def _part(words: _Words, w: PackedWeight, part: np.ndarray, rotated: int) -> list[int]:
    rows, instance, group, row_bytes = (int(v) for v in part[:4])
    table, bits, scale = instances()[instance]
    codes, scales, biases, book = (tuple(map(int, pair)) for pair in part[4:].reshape(4, 2))
    groups = -(-w.columns // max(group, 1)) * rows * _SCALE_BYTES[scale]

    def place(pair: tuple[int, int], count: int, size: int) -> int:
        return _NONE if pair[0] < 0 else words.place(w.buffers[pair[0]], pair[1], count, size)

    kind = _TABLES.index(table) << 16 | bits << 8 | _SCALES.index(scale)
    return [
        rows,
        kind | rotated,
        group,
        -(-row_bytes // 16) * 4,
        place(codes, rows, row_bytes),
        place(scales, 1, groups),
        place(biases, 1, groups),
        place(book, 1, 4 << bits),
    ]
