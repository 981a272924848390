"""Packed weights as GPU kernels read them: one array of words and a table of parts.

A GPU reads 16 bytes at a time and binds whole buffers, so a weight's arrays are copied once, side
by side, each at a multiple of 16 bytes. Codes stay the checkpoint's own bits; rows whose length is
no multiple of 16 bytes get room behind them, and the scales in GGUF's 17-byte blocks, which would
leave no code aligned, become an array of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import UnsupportedError
from .packed import PackedWeight, instances
from .weight import Rotation

#: Numbers of a part in the table, metal/weight.metal.
FIELDS = 8
_NONE = 0xFFFFFFFF
ROTATED = 1 << 24  # in a kind: the part reads x rotated
_GROUP_SHIFT = 25  # above it, group / 32; 0 for one scale a row
_TABLES = ("linear", "linear_signed", "e2m1", "e2m1_gguf", "codebook", "plain")
_SCALES = ("f32", "f16", "bf16", "e8m0")
_SCALE_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "e8m0": 1}


def table_of(kind: int) -> str:
    """The table of a part's kind."""
    return _TABLES[kind >> 16 & 255]


def bits_of(kind: int) -> int:
    """Bits of a code of a part's kind."""
    return kind >> 8 & 255


def scale_of(kind: int) -> str:
    """How scales, or plain numbers, of a part's kind are stored."""
    return _SCALES[kind & 255]


class Words:
    """Codes, scales, biases and codebooks, each once and at a multiple of 16 bytes, as u32 ``[n]``.

    Nothing is read before `joined`.
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[int, int, int, np.ndarray]] = []  # place, rows, bytes of one, data
        self._known: dict[tuple[int, int, int], int] = {}
        self._end = 0

    def place(
        self, buffer: np.ndarray, offset: int, rows: int, row_bytes: int, align: int = 16
    ) -> int:
        """Where ``rows`` rows of ``row_bytes`` bytes are, in units of 16 bytes; rows padded."""
        data = buffer[offset : offset + rows * row_bytes].reshape(rows, row_bytes)
        key = (data.__array_interface__["data"][0], rows, row_bytes)
        if key not in self._known:
            self._known[key] = self.add(data, align)
        return self._known[key]

    def add(self, data: np.ndarray, align: int = 16) -> int:
        """Where the rows of ``data``, u8 ``[rows, ...]``, are from now on."""
        at, rows = self._end, len(data)
        line = -(-(data.size // rows) // align) * align
        self._pieces.append((at, rows, line, data))
        self._end += rows * line
        return at // 16

    @property
    def nbytes(self) -> int:
        """Bytes of `joined`."""
        return self._end + 128  # a kernel's last piece may reach behind the last row

    def joined(self) -> np.ndarray:
        """A copy of them all, u32 ``[n]``."""
        words = np.zeros(self.nbytes, np.uint8)
        for at, rows, line, data in self._pieces:
            lines = words[at : at + rows * line].reshape(rows, line)
            lines[:, : data.size // rows] = data.reshape(rows, -1)
        return words.view(np.uint32)


@dataclass(frozen=True, slots=True)
class GpuWeight:
    """One or more packed weights that read the same input, as one.

    Attributes:
        words: what the parts are places in; None once a GPU has a copy.
        parts: u32 ``[experts, parts, 8]``: rows, kind, group, words from row to row, places of
            codes, scale, bias, codebook in units of 16 bytes.
        kinds: the different kinds of its parts: ``Kind`` in metal/weight.metal.
        rows: of one expert.
        columns: k of the (padded) matrix.
        in_features: columns of the matrix before padding.
        rotation: what the parts marked as rotated read x through; its signs, where their number is
            no multiple of 8, are repeated to all columns.
    """

    words: Words | None
    parts: np.ndarray
    kinds: tuple[int, ...]
    rows: int
    columns: int
    in_features: int
    rotation: Rotation | None

    @property
    def experts(self) -> int:
        return self.parts.shape[0]

    def blocks(self, height: int) -> int:
        """Blocks of ``height`` rows of one part each, enough for any expert."""
        return max(sum(-(-int(n) // height) for n in expert[:, 0]) for expert in self.parts)


def gpu_weight(*weights: PackedWeight) -> GpuWeight:
    """Weights side by side: rows of the first, then of the second, and so on.

    Their experts, columns before padding and rotations (of those that have one) must agree, which
    `hadamoe.roles` has checked.
    """
    turned = next((w for w in weights if w.rotation is not None), weights[0])
    words = Words()
    table = []
    for e in range(weights[0].experts):
        for w in weights:
            rotated = ROTATED if w.rotation is not None else 0
            table += [_part(words, w, part, rotated) for part in w.parts[e] if part[0]]
    parts = np.array(table, np.uint32).reshape(weights[0].experts, -1, FIELDS)
    kinds = tuple(int(k) for k in np.unique(parts[..., 1]))
    rows = sum(w.rows for w in weights)
    columns = (turned.columns, turned.in_features)
    return GpuWeight(words, parts, kinds, rows, *columns, _whole(turned))


def gpu_experts(experts: PackedWeight, shared: PackedWeight) -> tuple[GpuWeight, GpuWeight]:
    """Experts and, behind the last, the shared one: two weights with one array of words.

    Both have the same words and all kinds, and as many parts, of which some may have no rows. Their
    tables, joined, are that of the experts with the shared one as the last.
    """
    words, both = Words(), (experts, shared)
    width = max(sum(part[0] > 0 for part in expert) for w in both for expert in w.parts)
    tables = []
    for w in both:
        table = np.zeros((w.experts, width, FIELDS), np.uint32)
        rotated = ROTATED if w.rotation is not None else 0
        for e, expert in enumerate(w.parts):
            parts = [_part(words, w, part, rotated) for part in expert if part[0]]
            table[e, : len(parts)] = parts
        tables.append(table)
    every = np.concatenate(tables).reshape(-1, FIELDS)
    kinds = tuple(int(k) for k in np.unique(every[every[:, 0] > 0, 1]))
    return tuple(
        GpuWeight(words, table, kinds, w.rows, w.columns, w.in_features, _whole(w))
        for w, table in zip(both, tables, strict=True)
    )


def _whole(w: PackedWeight) -> Rotation | None:
    r = w.rotation
    if r is None:
        return None
    return Rotation(r.block, *(whole_signs(s, w.columns) for s in (r.pre, r.post)))


def whole_signs(signs: np.ndarray | None, columns: int) -> np.ndarray | None:
    """Signs as kernels read them, 8 at a time: repeated to all columns where they are odd ones."""
    if signs is None or len(signs) % 8 == 0:
        return signs
    return np.tile(signs, columns // len(signs))


def _part(words: Words, w: PackedWeight, part: np.ndarray, rotated: int) -> list[int]:
    rows, instance, group, row_bytes = (int(v) for v in part[:4])
    table, bits, scale = instances()[instance]
    arrays = [tuple(map(int, pair)) for pair in part[4:].reshape(4, 2)]
    groups = 1 if table == "plain" else -(-w.columns // group)
    if groups > 1 and group // 32 >= 1 << (31 - _GROUP_SHIFT):
        raise UnsupportedError(f"gpu_weight: group is {group}, needs less than 2048, or the row")
    kind = _TABLES.index(table) << 16 | bits << 8 | _SCALES.index(scale) | rotated
    kind |= (group // 32 if groups > 1 else 0) << _GROUP_SHIFT

    align = 32 if table == "plain" and bits == 32 else 16  # 8 columns are read at once
    line = -(-(groups * 16 if table == "e2m1_gguf" else row_bytes) // align) * align // 4
    if table == "e2m1_gguf":
        places = _gguf(words, w.buffers[arrays[0][0]][arrays[0][1] :], rows, row_bytes, groups)
        return [rows, kind, group, line, *places, _NONE, _NONE]
    scales = groups * rows * _SCALE_BYTES[scale]
    sizes = ((rows, row_bytes, align), (1, scales), (1, scales), (1, 4 << bits))
    places = [
        _NONE if number < 0 else words.place(w.buffers[number], offset, *size)
        for (number, offset), size in zip(arrays, sizes, strict=True)
    ]
    return [rows, kind, group, line, *places]


def _gguf(words: Words, data: np.ndarray, rows: int, row_bytes: int, blocks: int) -> list[int]:
    """Places of the codes and of the scales of rows of blocks: a scale, 16 bytes of codes."""
    lines = data[: rows * row_bytes].reshape(rows, row_bytes)[:, : 17 * blocks]
    lines = lines.reshape(rows, blocks, 17)
    return [
        words.add(lines[..., 1:]),
        words.add(lines[None, ..., 0]),
    ]
