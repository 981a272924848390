"""Formats of a quantized KV cache as data: codecs, presets, rotation signs, bytes.

A *codec* stores one side (keys or values) of 64-token pages; a *preset* names both sides. What a
codec means is written in numpy in `hadamoe.reference_kv`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from . import _cpu
from .errors import ContractError

__all__ = ["CODECS", "PAGE", "PRESETS", "KVFormat", "formats_of", "page_bytes", "signs"]

#: tokens a page holds
PAGE = 64
#: codec name -> number the kernels know it by
CODECS: dict[str, int] = {name: i for i, (name, _) in enumerate(_cpu.kv_codecs())}
#: of the random signs of a rotation, as in mlx-swift-lm
KEY_SEED, VALUE_SEED = 42, 43


class KVFormat(NamedTuple):
    """How a layer keeps its keys and its values: names of `CODECS`."""

    key: str
    value: str

    @property
    def raw(self) -> bool:
        """Whether nothing is quantized."""
        return self == ("bf16", "bf16")


#: name -> format. The first five are this library's own, the others what other software stores.
PRESETS: dict[str, KVFormat] = {
    "bf16": KVFormat("bf16", "bf16"),
    "hk8v8": KVFormat("h8", "h8"),
    "hk8v4": KVFormat("h8", "h4"),
    "hk4v4": KVFormat("h4", "h4"),
    "hk4v3": KVFormat("h4", "h3"),
    "hk4v2": KVFormat("h4", "h2"),
    "turbo4v2": KVFormat("turbo4", "turbo2"),
    "turbo4": KVFormat("turbo4", "turbo4"),
    "turbo3": KVFormat("turbo3", "turbo3"),
    "turbo2": KVFormat("turbo2", "turbo2"),
    "fp8": KVFormat("fp8", "fp8"),
    "affine8": KVFormat("affine8", "affine8"),
    "affine4": KVFormat("affine4", "affine4"),
    "kivi4": KVFormat("kivi4", "kivi4"),
    "kivi2": KVFormat("kivi2", "kivi2"),
}


def _format_of(name: str) -> KVFormat:
    if name in PRESETS:
        return PRESETS[name]
    pair = re.fullmatch(r"(\w+)/(\w+)", name)  # any two codecs
    if pair and pair[1] in CODECS and pair[2] in CODECS:
        return KVFormat(pair[1], pair[2])
    raise ContractError(
        f"kv: {name!r} is no preset, needs one of {', '.join(PRESETS)}, or KEY/VALUE of "
        f"{', '.join(CODECS)}"
    )


def formats_of(kv: str | Sequence[str], layers: int) -> list[KVFormat]:
    """The format of each attention layer.

    Args:
        kv: a preset, ``"KEY/VALUE"`` of two codecs, or one of these per layer.

    Raises:
        ContractError: an unknown name, or a list of another length.
    """
    if isinstance(kv, str):
        return [_format_of(kv)] * layers
    if len(kv) != layers:
        raise ContractError(f"kv: has {len(kv)} presets, needs one or {layers}")
    return [_format_of(name) for name in kv]


def page_bytes(codec: str, head_dim: int) -> int:
    """Bytes of one page of one head and one side.

    Raises:
        ContractError: an unknown codec, or head_dim is one it cannot store.
    """
    if codec not in CODECS:
        raise ContractError(f"kv: {codec!r} is no codec, needs one of {', '.join(CODECS)}")
    least = 64 if codec.startswith("affine") else 32
    needs = f"a multiple of {least} up to 512"
    fits = head_dim % least == 0 and 0 < head_dim <= 512
    if codec.startswith("turbo"):  # mlx-swift-lm's codebooks
        fits, needs = head_dim in (64, 128, 256), "64, 128 or 256"
    elif codec[0] == "h":
        fits, needs = fits and head_dim & (head_dim - 1) == 0, needs + ", a power of two"
    if not fits:
        raise ContractError(f"kv: head_dim is {head_dim}, {codec} needs {needs}")
    return _cpu.kv_page_bytes(CODECS[codec], head_dim)


@cache
def signs(head_dim: int, seed: int) -> np.ndarray:
    """f32 ``[head_dim]`` of +-1: mlx's ``random.uniform(key=random.key(seed)) > 0.5``.

    Source: threefry2x32, 20 rounds (Salmon et al. 2011), counters as mlx lays them out.
    """
    half = head_dim // 2
    x0, x1 = np.arange(half, dtype=np.uint32), np.arange(half, head_dim, dtype=np.uint32)
    k0, k1 = np.uint32(seed >> 32), np.uint32(seed & 0xFFFFFFFF)
    keys = (k0, k1, k0 ^ k1 ^ np.uint32(0x1BD11BDA))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for i in range(5):
        for r in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x0 = x0 + x1
            x1 = ((x1 << np.uint32(r)) | (x1 >> np.uint32(32 - r))) ^ x0
        x0, x1 = x0 + keys[(i + 1) % 3], x1 + keys[(i + 2) % 3] + np.uint32(i + 1)
    uniform = np.concatenate([x0, x1]).astype(np.float32) / np.float32(2**32 - 1)
    result = np.where(uniform > np.float32(0.5), np.float32(1), np.float32(-1))
    result.flags.writeable = False
    return result
