"""How far any kernel's x @ W^T may be from the exact one.

Kernels round in two places. f32 rounds products and sums: `rounding_bound` of ``columns`` products
and sums, the longest chain there is in any order, and four more for scale, bias, their product and
the join of groups. What is added may be larger than the numbers (`sizes`).

Kernels on integers (csrc/cpu/qmatmul_avx512_prepare.h, cuda/fixed.cuh) round x instead, to P
signed bytes in units u of a power of two that 128 columns share. The largest of these, t, is an
integer of L = 127 (256^(P-1) + ... + 1) at most, and half the unit would not do: u < 2 t / L. An x
is off by half of its unit, d <= t / L, whatever its own size: beside one column of t the other 127
may lose all they have, which no chain of relative roundings covers. Entries of a codebook are
rounded alike on CUDA, off by D <= T / L, of T: scale times the largest entry. So y is off by

    sum_k |w| d + |x| D + d D + dropped <= sum_k (|w| t + |x| T + (1 / L + R) t T) / L

at most, where products of bytes c + q >= P are dropped, each 2^14 times what its place counts:
P = 3 leaves out two of 2^8 and one of 1, P = 2 one of 1. They count u U < 4 t T / L^2, so
R = 4 * 2^14 * (513 or 1) / L.

From there on sums of 32 columns or more are exact integers, and f32 has fewer roundings to add than
columns. What it rounds may be a number's upper bytes alone: |x| + 2^8 u < |x| + 2^-13 t.
A codebook of two bits is sums of its bits in cuda/codes.cuh: factors of 2, 1, 4 and 1 times T at
most, made and added in 8 roundings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .. import reference
from ..weight import Instance, Part, Weight
from .claims import gamma, rounding_bound
from .samples import magnitude, values

#: L of so many bytes.
LARGEST = {2: 127 * 257, 3: 127 * 65793}
#: R of so many bytes.
DROPPED = {2: 2.0**16 / LARGEST[2], 3: 2.0**16 * 513 / LARGEST[3]}


def _wide(stored: np.ndarray | None, part: Part, columns: int) -> np.ndarray | float:
    """Scales or biases as f64 [rows, columns]."""
    if stored is None:
        return 0.0
    group = np.arange(columns) // part.group
    return reference.widen(stored, part.instance.scale).astype(np.float64)[:, group]


def _entries(part: Part, columns: int) -> np.ndarray:
    """The table's number of every code, f64 [rows, columns]."""
    instance = Instance(part.instance.table, part.instance.bits, "f32")
    scale = np.ones(part.scale.shape, np.float32)
    bare = replace(part, instance=instance, scale=scale, bias=None)
    return reference.part_values(bare, columns).astype(np.float64)


def _apart(part: Part, columns: int) -> np.ndarray:
    """|terms| of numbers that kernels add in two: a code from its middle, and what is left."""
    table, bits, _ = part.instance
    if table == "linear":
        scale, bias = (_wide(a, part, columns) for a in (part.scale, part.bias))
        middle = 1 << (bits - 1)
        return np.abs(scale * (_entries(part, columns) - middle)) + np.abs(bias + middle * scale)
    if table == "codebook" and bits == 2:
        base = (float(part.codebook[0]) + float(part.codebook[2])) / 2
        entries = np.abs(_entries(part, columns) - base) + abs(base)
        return np.abs(_wide(part.scale, part, columns)) * entries
    return np.zeros((part.rows, columns))


def _largest_entry(part: Part, columns: int) -> np.ndarray:
    """T: |scale| times the largest entry of a codebook."""
    if part.codebook is None:
        return np.zeros((part.rows, columns))
    return np.abs(_wide(part.scale, part, columns)) * np.abs(part.codebook).max()


def _two_bits(part: Part, columns: int) -> np.ndarray:
    """T of codebooks of two bits."""
    book = part.codebook if part.instance.bits == 2 else None
    return _largest_entry(replace(part, codebook=book), columns)


def _of_all(weight: Weight, numbers: Callable[[Part, int], np.ndarray]) -> np.ndarray:
    """Numbers of every part, f64 ``[E * n, k]``."""
    return np.concatenate([numbers(p, weight.columns) for e in weight.parts for p in e])


def sizes(weight: Weight) -> np.ndarray:
    """Largest |terms| that a kernel may add for each number, f64 ``[E * n, k]``."""
    whole = np.abs(values(magnitude(weight))).reshape(-1, weight.columns)
    return np.maximum(whole, _of_all(weight, _apart))


def tops(x: np.ndarray) -> np.ndarray:
    """t: the largest |x| of each 128 columns, for each of them."""
    top = np.zeros(x.shape)
    for k in range(0, x.shape[-1], 128):
        top[..., k : k + 128] = np.abs(x[..., k : k + 128]).max(-1, keepdims=True)
    return top


def fixed_point(x: np.ndarray, weight: Weight, planes: int = 3) -> np.ndarray:
    """Largest error of ``y[r, E * n]`` from x and codebooks in ``planes`` bytes (derived above)."""
    top, size = tops(x), np.abs(values(weight)).reshape(-1, weight.columns)
    entry, most = _of_all(weight, _largest_entry), LARGEST[planes]
    both = (1 / most + DROPPED[planes]) * top
    return (top @ size.T + (np.abs(x) + both) @ entry.T) / most


def qmatmul_bound(x: np.ndarray, weight: Weight, y: np.ndarray, dtype: str) -> np.ndarray:
    """Largest |error| of ``y[r, E * n] = x @ W^T`` for whatever kernel and order of additions."""
    x = np.asarray(x, np.float64)
    upper = np.abs(x) + 2.0**-13 * tops(x)
    fixed = fixed_point(x, weight) + 8 * gamma(8) * (upper @ _of_all(weight, _two_bits).T)
    terms = upper @ sizes(weight).T + fixed
    return fixed + rounding_bound(terms, weight.columns + 4, np.abs(y) + fixed, dtype)
