"""bf16 numbers as numpy holds them: their bits in u16."""

from __future__ import annotations

import numpy as np


def to_bf16(x: np.ndarray) -> np.ndarray:
    """bf16 bits (u16) of finite f32 values, rounded to nearest even."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The f32 values of bf16 bits (u16), exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
