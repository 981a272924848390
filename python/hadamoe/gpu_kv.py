"""What launch plans of the quantized KV cache know of its codecs, whatever the GPU."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .kv import KVFormat

_ROTATED = ("h", "t")  # first letters of codecs that turn rows
#: Bits of our codecs -> levels per deviation, and the share of a row's square that codes lose.
_KAPPA = {2: np.float32(59.59375), 3: np.float32(40.90625), 4: np.float32(38.140625)}
_ERRORS = {2: 0.117482, 3: 0.034549, 4: 0.009506}


def rotated(codec: str) -> bool:
    """Whether pages of a codec hold rows through signs and a Hadamard transform."""
    return codec[0] in _ROTATED


def our_bits(codec: str) -> int:
    """Bits of a code of ours, else 0."""
    return int(codec[1:]) if codec[0] == "h" else 0


def worth(codec: str, d: int, scale: float) -> float:
    """What a level is worth of a row's scale, or fp8's scale."""
    bits = our_bits(codec)
    unit = np.float32(1 / np.sqrt(d)) / _KAPPA[bits] if bits in _KAPPA else 1.0
    return float(scale if codec == "fp8" else unit)


def noise(codec: str) -> float:
    """What a codec of ours adds to a row's square, as a share of what codes keep; 0 of others."""
    lost = _ERRORS.get(our_bits(codec), 0.0)
    return float(lost * (1 - lost))


class Heads(NamedTuple):
    """The heads of attention and how their cache stores them.

    Attributes:
        batch, query, kv, d: sequences, query heads, key heads, columns of a head.
        format: codecs of keys and values, or None for a cache without codes.
        scales: of fp8 keys and values.
    """

    batch: int
    query: int
    kv: int
    d: int
    format: KVFormat | None = None
    scales: tuple[float, float] = (1.0, 1.0)

    @property
    def query_dtype(self) -> str:
        """Of queries as scores of coded pages take them."""
        return "int8" if self.format and our_bits(self.format.key) else "float32"
