"""Weights and numbers that products on every GPU are tested with."""

from __future__ import annotations

import numpy as np

from hadamoe import Instance

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


def signs(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.choice(np.float32([-1, 1]), n)


def normed(x: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * gamma
