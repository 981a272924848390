"""What a synthetic tensor holds, and the blocks of random bytes it is cut from.

Random blocks are made once and reused from a different offset for every module. Their lengths are
primes, so no two rows of a matrix start at the same place of the block.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..bf16 import to_bf16

CODE_BLOCK = 16_777_213  # bytes, prime
VALUE_BLOCK = 1_048_573  # values, prime

#: Bytes of one element of a safetensors dtype.
ITEM_BYTES = {"U8": 1, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "I64": 8}


@dataclass(frozen=True, slots=True)
class Fill:
    """Contents of a tensor.

    ``codes``: uniform random bits. ``normal``: a + b * N(0, 1). ``uniform``: a + b * U[0, 1).
    ``exponent``: E8M0 bytes a + 1 (a share of b) and a. ``bytes``: ``data`` itself.
    """

    kind: Literal["codes", "normal", "uniform", "exponent", "bytes"]
    a: float = 0.0
    b: float = 0.0
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a synthetic file; those of one ``module`` start at one offset of a block."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    fill: Fill
    module: str

    @property
    def nbytes(self) -> int:
        n = ITEM_BYTES[self.dtype]
        for d in self.shape:
            n *= d
        return n


class Source:
    """Cuts tensors out of random blocks; the same seed gives the same bytes."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._blocks: dict[tuple, np.ndarray] = {}

    def _rng(self, kind: str) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self._seed, zlib.crc32(kind.encode())]))

    def _base(self, kind: str) -> np.ndarray:
        if kind == "codes":
            return np.frombuffer(self._rng(kind).bytes(CODE_BLOCK), np.uint8)
        if kind == "normal":
            # clipped: f16 and bf16 files of trained models have no 5 sigma weights either
            return self._rng(kind).standard_normal(VALUE_BLOCK, np.float32).clip(-4, 4)
        return self._rng(kind).random(VALUE_BLOCK, np.float32)

    def _block(self, fill: Fill, dtype: str) -> np.ndarray:
        key = (fill, dtype)
        if key not in self._blocks:
            base_key = (fill.kind,)
            if base_key not in self._blocks:
                self._blocks[base_key] = self._base(fill.kind)
            base = self._blocks[base_key]
            if fill.kind == "codes":
                values = base
            elif fill.kind == "exponent":
                values = (int(fill.a) + (base < fill.b)).astype(np.uint8)
            else:
                values = np.float32(fill.a) + np.float32(fill.b) * base
                if dtype == "BF16":
                    values = to_bf16(values)
                elif dtype == "F16":
                    values = values.astype(np.float16)
            self._blocks[key] = values
        return self._blocks[key]

    def chunks(self, tensor: Tensor) -> Iterator[memoryview]:
        """The tensor's bytes, in order, as views of at most one block."""
        if tensor.fill.kind == "bytes":
            yield memoryview(tensor.fill.data)
            return
        block = self._block(tensor.fill, tensor.dtype)
        left = tensor.nbytes // block.itemsize
        start = zlib.crc32(tensor.module.encode()) % block.size
        while left:
            part = block[start : start + left]
            yield memoryview(part).cast("B")
            left, start = left - part.size, 0
