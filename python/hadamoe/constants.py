"""Numbers that belong to the formats rather than to their files: sign vectors and codebooks.

The arrays are cached and shared: do not write to them.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from math import lgamma, log, pi, sqrt

import numpy as np

# IEEE bits of the positive half of turboquant-vllm's codebooks for N(0, 1/128), ascending; the
# tables are antisymmetric. 3 and 4 bits are its 100 Lloyd iterations, not converged: a true
# Lloyd-Max table differs.
_TQ_HALVES = {
    2: (0x3D2400E7, 0x3E08AB6B),
    3: (0x3CB1778C, 0x3D88D9FA, 0x3DF345FF, 0x3E42C596),
    4: (
        0x3C3669EC, 0x3D09E98B, 0x3D69B0E4, 0x3DA7F06A,
        0x3DE059FC, 0x3E10D520, 0x3E39AF1A, 0x3E75ED5A,
    ),
}  # fmt: skip


@lru_cache
def tq_codebook(bits: int) -> np.ndarray:
    """TQ's codebook for groups of 128: f32 [2^bits], ascending; bits 2, 3 or 4."""
    half = np.array(_TQ_HALVES[bits], np.uint32).view(np.float32)
    return np.concatenate([-half[::-1], half])


@lru_cache
def tq_signs(group: int = 128, seed: int = 42) -> tuple[np.ndarray, np.ndarray]:
    """TQ's two sign vectors, f32 [group] of +-1: the low bits of MT19937's first 2*group words.

    The first comes before the transform of an input, the second after it.
    """
    words = np.random.RandomState(seed).randint(0, 1 << 32, 2 * group, dtype=np.uint32)
    signs = (words & 1).astype(np.float32) * 2 - 1
    return signs[:group].copy(), signs[group:].copy()


@lru_cache
def jangtq_signs(columns: int, seed: int = 42) -> np.ndarray:
    """JANGTQ's sign vector, f32 [columns] of +-1.

    It is ``default_rng(seed).choice([-1, 1], columns)`` written over PCG64's raw words, which numpy
    promises never to change: bit 31 of word j gives sign 2j, bit 63 sign 2j + 1.
    """
    words = np.random.PCG64(seed).random_raw((columns + 1) // 2)
    bits = np.stack([words >> np.uint64(31), words >> np.uint64(63)], axis=1).reshape(
        -1
    ) & np.uint64(1)
    return bits[:columns].astype(np.float32) * 2 - 1


def _trapezoid(y: np.ndarray, x: np.ndarray) -> float:
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())


@lru_cache
def jangtq_codebook(columns: int, bits: int) -> np.ndarray:
    """JANGTQ's codebook for rows of this many columns: f32 [2^bits], ascending.

    Lloyd-Max in f64 for one coordinate of a uniform point on the sphere S^(columns-1), on jang's
    own grid of 10,000 points with its stopping rule, so that the f32 values are bit-equal to its
    files'.
    """
    x = np.linspace(-1.0, 1.0, 10_000)
    if columns > 2:
        front = lgamma(columns / 2) - 0.5 * log(pi) - lgamma((columns - 1) / 2)
        density = np.exp(front + (columns - 3) / 2 * np.log(np.maximum(1 - x * x, 1e-30)))
    else:
        density = np.ones_like(x)
    density = density / _trapezoid(density, x)
    reach = 3 / sqrt(columns)
    c = np.linspace(-reach, reach, 1 << bits)
    for _ in range(200):
        edges = np.concatenate([[-1.0], (c[:-1] + c[1:]) / 2, [1.0]])
        at = np.searchsorted(x, edges, "left")
        at[-1] = len(x)
        new = c.copy()
        for i, (a, b) in enumerate(itertools.pairwise(at)):
            if b - a > 1:
                f, p = density[a:b], x[a:b]
                new[i] = _trapezoid(p * f, p) / max(_trapezoid(f, p), 1e-10)
        if np.all(np.abs(c - new) <= 1e-10 + 1e-5 * np.abs(new)):
            break
        c = new
    return np.sort(c).astype(np.float32)
