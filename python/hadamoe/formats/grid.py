"""Stored tensors as a descriptor's grid of parts: views only, nothing copied."""

from __future__ import annotations

import numpy as np

from ..checkpoint import Tensor
from ..weight import Instance, Rotation, Weight
from .names import FLOATS, Files


def grid(
    instance: Instance,
    columns: int,
    group: int,
    experts: int | None,
    codes: np.ndarray,
    scale: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    codebook: np.ndarray | None = None,
    rotation: Rotation | None = None,
    in_features: int = 0,
) -> Weight:
    """One part per expert from arrays whose rows run over experts, then rows.

    codes: u8 ``[experts * rows, row_bytes]``; scale, bias: ``[experts * rows, groups]``.
    """
    head = lead(experts)
    codes, scale, bias = (
        None if a is None else a.reshape(*head, -1, a.shape[1]) for a in (codes, scale, bias)
    )
    return Weight.of(
        instance, columns, codes, scale, bias, codebook,
        group=group, rotation=rotation, in_features=in_features,
    )  # fmt: skip


def flat_rows(t: Tensor, rows: int) -> np.ndarray:
    """The tensor as ``[rows, rest]`` in its own dtype; f16 and bf16 come as u16 bits."""
    array = t.array.reshape(rows, t.array.size // rows)
    return array.view(np.uint16) if t.dtype == "F16" else array


def lead(experts: int | None) -> tuple[int, ...]:
    """The leading dimension a stack of experts has."""
    return () if experts is None else (experts,)


def plain(files: Files, path: str, rows: int, columns: int, experts: int | None) -> Weight | None:
    """A weight stored as numbers, or None where the files have no ``path.weight``."""
    name = f"{path}.weight"
    if name not in files:
        return None
    t = files.take(name, tuple(FLOATS), (*lead(experts), rows, columns))
    scale = FLOATS[t.dtype]
    instance = Instance("plain", 32 if scale == "f32" else 16, scale)
    return grid(instance, columns, columns, experts, t.bytes_2d((experts or 1) * rows))
