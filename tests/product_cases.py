"""Weights and numbers that products on every GPU are tested with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hadamoe import Instance, Weight
from hadamoe.verify import claims, samples

#: One of every table and width, with the group that models use; 0 is one scale a row.
MODEL = [
    (Instance("linear", 8, "bf16"), 64),
    (Instance("linear", 6, "bf16"), 64),
    (Instance("linear", 5, "bf16"), 64),
    (Instance("linear", 4, "bf16"), 64),
    (Instance("linear", 3, "bf16"), 64),
    (Instance("linear", 2, "f16"), 32),
    (Instance("linear_signed", 4, "bf16"), 128),
    (Instance("linear_signed", 8, "bf16"), 0),
    (Instance("e2m1", 4, "e8m0"), 32),
    (Instance("e2m1_gguf", 4, "e8m0"), 32),
    (Instance("codebook", 2, "f16"), 0),
    (Instance("codebook", 3, "f32"), 0),
    (Instance("codebook", 4, "f32"), 0),
    (Instance("plain", 16, "bf16"), 0),
    (Instance("plain", 32, "f32"), 0),
]

#: A few, each multiplied in another way, for what all of them share.
INSTANCE = Instance("linear", 4, "bf16")
TABLES = [
    INSTANCE,
    Instance("linear_signed", 8, "f32"),
    Instance("e2m1", 4, "e8m0"),
    Instance("codebook", 3, "f32"),
    Instance("plain", 16, "f16"),
]


def signs(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.choice(np.float32([-1, 1]), n)


def normed(x: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * gamma


def one_column(
    rng: np.random.Generator, inst: Instance, tokens: int, rows: int = 34, columns: int = 256
) -> tuple[np.ndarray, Weight]:
    """x f32 with one column 2^20 times the others, and a weight that is 0 there.

    A chain of relative roundings from number to number is off by next to nothing here; a kernel
    whose columns share a unit by much of what the others have.
    """
    w = samples.random_weight(rng, inst, rows, columns, kind="gaussian")
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    x[:, 7] = 2.0**20
    part = w.parts[0][0]
    zero = 1 << (inst.bits - 1) if inst.table == "linear_signed" else 0
    stream = np.unpackbits(part.codes, axis=1, bitorder="little")
    first = 64 if inst.table == "e2m1_gguf" else 7 * inst.bits  # behind its scale, a low nibble
    stream[:, first : first + inst.bits] = zero >> np.arange(inst.bits) & 1
    book = None if part.codebook is None else part.codebook - part.codebook[0]
    bias = None if part.bias is None else np.zeros_like(part.bias)
    codes = np.packbits(stream, axis=1, bitorder="little")
    part = replace(part, codes=codes, bias=bias, codebook=book)
    assert not samples.values(replace(w, parts=((part,),)))[..., 7].any()
    return x, replace(w, parts=((part,),))


def chain_alone(x: np.ndarray, w: Weight) -> np.ndarray:
    """The error of x @ W^T that a chain of f32's roundings allows, were W stored in f32."""
    size = np.abs(samples.values(w)).reshape(-1, w.columns)
    return claims.gamma(w.columns + 4) * (np.abs(x).astype(np.float64) @ size.T)
