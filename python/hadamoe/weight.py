"""The weight descriptor: how any stored matrix says which bytes mean what.

One equation serves every format (DESIGN.md, section 1)::

    y[t, n] = sum_k xr[t, k] * (scale[n, g] * table[code[n, k]] + bias[n, g]),   g = k // group

A `Weight` is a grid of parts ``[expert][part]``: each part is a block of rows stored with one
instance. A plain linear is one part; fused gate/up or q/k/v is several; a stack of experts is one
row of parts per expert, each free to have its own width. Arrays are views of the file's bytes:
nothing is copied, nothing is repacked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .errors import ContractError


class Instance(NamedTuple):
    """What a kernel is compiled for: table kind, bits per code, scale dtype.

    Tables turn a code into a number: ``linear`` 0..2^b-1 with a bias, ``linear_signed`` code -
    2^(b-1), ``e2m1`` MXFP4, ``e2m1_gguf`` the same in GGUF's blocks, ``codebook`` a stored f32
    table, ``plain`` the number itself. Scales are f32, f16, bf16 or e8m0. For ``plain`` weights
    bits and scale name the stored number: (16, bf16), (16, f16), (32, f32).
    """

    table: str
    bits: int
    scale: str

    def __str__(self) -> str:
        several = self.table in ("linear", "linear_signed", "codebook")  # else the name says it
        return f"{self.table}{self.bits if several else ''}/{self.scale}"


@dataclass(frozen=True, slots=True)
class Part:
    """A block of rows stored with one instance.

    Attributes:
        instance: table, bits and scale dtype of every row.
        rows: number of rows n.
        group: columns that share one scale; equal to the weight's columns for one scale per row.
        codes: u8 ``[rows, row_bytes]``, each row one little-endian bit stream, LSB first.
        scale: ``[rows, columns / group]`` in storage dtype (f32; f16 and bf16 bits as u16; E8M0 as
            u8); None for ``plain``.
        bias: like scale, in the scale's dtype; only for ``linear``, None for zeros.
        codebook: f32 ``[2**bits]``, only for ``codebook``.
    """

    instance: Instance
    rows: int
    group: int
    codes: np.ndarray
    scale: np.ndarray | None = None
    bias: np.ndarray | None = None
    codebook: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """Bytes a matrix-vector product reads: codes, scales and biases."""
        return sum(a.nbytes for a in (self.codes, self.scale, self.bias) if a is not None)


@dataclass(frozen=True, slots=True)
class Rotation:
    """The orthogonal map post . H(block) . pre that a weight's columns were stored under.

    Attributes:
        block: size of one Hadamard block; None splits the columns into their distinct powers of
            two, largest first (a power-of-two width is one block).
        pre: f32 signs applied before the transform, repeated along the columns; None for ones.
        post: f32 signs applied after it; None for ones.
    """

    block: int | None
    pre: np.ndarray | None = None
    post: np.ndarray | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rotation):
            return NotImplemented
        return self.block == other.block and all(
            (a is None) == (b is None) and (a is None or np.array_equal(a, b))
            for a, b in ((self.pre, other.pre), (self.post, other.post))
        )

    @property
    def sign_counts(self) -> dict[str, int]:
        """How many signs pre and post have, 0 for none."""
        return {n: 0 if s is None else len(s) for n, s in (("pre", self.pre), ("post", self.post))}

    def __hash__(self) -> int:
        return hash((self.block, None if self.pre is None else self.pre.tobytes()))


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix, or a stack of experts' matrices, as stored.

    Attributes:
        columns: k as the kernel sees it (a padded width where the format pads).
        parts: ``[expert][part]``; every expert has the same number of rows in all.
        rotation: what the input must go through first, or None.
        in_features: columns of the matrix before padding.
    """

    columns: int
    parts: tuple[tuple[Part, ...], ...]
    rotation: Rotation | None = None
    in_features: int = 0

    def __post_init__(self) -> None:
        if not self.parts or not all(self.parts):
            raise ContractError("Weight: parts is empty, needs at least one part per expert")
        rows = {sum(p.rows for p in expert) for expert in self.parts}
        if len(rows) != 1:
            raise ContractError(f"Weight: experts have {sorted(rows)} rows, need one number")
        if not self.in_features:
            object.__setattr__(self, "in_features", self.columns)

    @classmethod
    def of(
        cls,
        instance: tuple[str, int, str],
        columns: int,
        codes: np.ndarray,
        scale: np.ndarray | None = None,
        bias: np.ndarray | None = None,
        codebook: np.ndarray | None = None,
        *,
        group: int | None = None,
        rotation: Rotation | None = None,
        in_features: int = 0,
    ) -> Weight:
        """A matrix, or a stack of experts' matrices, from arrays as they are stored.

        Args:
            instance: (table, bits, scale dtype), such as ``("linear", 4, "bf16")``.
            columns: k.
            codes: ``[rows, ...]`` or ``[experts, rows, ...]`` of any dtype (MLX's u32 words,
                compressed-tensors' i32, MXFP4 blocks of gpt-oss flattened, GGUF's bytes): the bytes
                of a row are its codes.
            scale, bias: ``[rows, groups]`` with the same leading axes; see `Part`.
            group: columns that share a scale; None takes it from scale's shape.
        """
        instance = Instance(*instance)
        lead = codes.shape[:-1]
        if len(lead) not in (1, 2):
            raise ContractError(f"Weight.of: codes has {codes.ndim} dimensions, needs 2 or 3")
        if columns < 1 or not codes.size:
            raise ContractError(
                f"Weight.of: columns={columns} and codes of shape {codes.shape}, need at least 1"
            )
        if not codes.flags.c_contiguous:
            raise ContractError("Weight.of: codes is not contiguous, needs row-major memory")
        flat = codes.reshape(-1, codes.shape[-1])
        if flat.dtype != np.uint8:
            flat = flat.view(np.uint8)
        count = len(flat)
        for name, a in (("scale", scale), ("bias", bias)):
            if a is not None and (not a.size or a.size % count or a.shape[: len(lead)] != lead):
                raise ContractError(
                    f"Weight.of: {name} has shape {a.shape}, needs {lead} and groups"
                )
        if group is None:
            group = 32 if instance.table == "e2m1_gguf" else columns
            if scale is not None:
                group = columns // (scale.size // count)
        scale, bias = (None if a is None else a.reshape(count, -1) for a in (scale, bias))
        rows = lead[-1]

        def part(first: int) -> tuple[Part]:
            at = slice(first, first + rows)
            s, b = (None if a is None else a[at] for a in (scale, bias))
            return (Part(instance, rows, group, flat[at], s, b, codebook),)

        parts = tuple(part(first) for first in range(0, count, rows))
        return cls(columns, parts, rotation, in_features)

    @property
    def rows(self) -> int:
        """Rows n of one expert (all parts together)."""
        return sum(p.rows for p in self.parts[0])

    @property
    def experts(self) -> int:
        return len(self.parts)

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for expert in self.parts for p in expert)

    def instances(self) -> set[Instance]:
        return {p.instance for expert in self.parts for p in expert}


def fuse_rows(weights: Sequence[Weight]) -> Weight:
    """Stack matrices that read the same input: rows of weights[0], then weights[1], ...

    Nothing is copied; the result lists the parts side by side. All must share columns, rotation and
    number of experts.
    """
    first = weights[0]
    for w in weights[1:]:
        if (w.columns, w.experts, w.rotation) != (first.columns, first.experts, first.rotation):
            raise ContractError(
                f"fuse_rows: columns={w.columns} experts={w.experts}, "
                f"needs columns={first.columns} experts={first.experts} and one rotation"
            )
    parts = tuple(tuple(p for w in weights for p in w.parts[e]) for e in range(first.experts))
    return replace(first, parts=parts)


def stack_experts(weights: Iterable[Weight]) -> Weight:
    """One weight of E experts from E weights of one expert each; widths may differ."""
    ws = list(weights)
    for w in ws[1:]:
        if (w.columns, w.rotation) != (ws[0].columns, ws[0].rotation):
            raise ContractError(
                f"stack_experts: columns={w.columns}, needs {ws[0].columns} and one rotation"
            )
    return replace(ws[0], parts=tuple(p for w in ws for p in w.parts))


def root_of(array: np.ndarray) -> np.ndarray:
    """The array that owns or maps the memory ``array`` is a view of."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
