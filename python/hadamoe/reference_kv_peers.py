"""What the codecs of other software do to keys and values, in numpy.

`kv_encode` and `kv_decode` are pages of a cache: 64 tokens of one head and one side, the codes of
every token, then scales. The other functions are what the peers store for an array of any shape.
"""

from __future__ import annotations

import numpy as np

from .bf16 import from_bf16, to_bf16
from .kv import KEY_SEED, PAGE, VALUE_SEED, page_bytes, signs
from .reference import hadamard

__all__ = [
    "TURBO_CODEBOOKS",
    "affine_decode",
    "affine_encode",
    "fp8_decode",
    "fp8_encode",
    "kivi_decode",
    "kivi_encode",
    "kv_decode",
    "kv_encode",
    "pack",
    "turbo_decode",
    "turbo_encode",
    "unpack",
]

F = np.float32

#: (columns, bits) -> centroids f32 [2^bits], not quite symmetric. Source: mlx-swift-lm,
#: TurboQuantKVCache.swift.
TURBO_CODEBOOKS: dict[tuple[int, int], np.ndarray] = {
    key: F(numbers)
    for key, numbers in {
        (64, 2): (-0.18745463, -0.05649366, 0.05649367, 0.18745449),
        (64, 3): (
            -0.26375133, -0.16599470, -0.09368263, -0.03040462,
            0.03040464, 0.09368261, 0.16599482, 0.26375186,
        ),
        (64, 4): (
            -0.32913971, -0.25096416, -0.19681059, -0.15295772,
            -0.11478586, -0.08000945, -0.04726735, -0.01563822,
            0.01563822, 0.04723797, 0.07994876, 0.11472529,
            0.15289739, 0.19675052, 0.25090477, 0.32908401,
        ),
        (128, 2): (-0.13302007, -0.03998107, 0.03998102, 0.13302033),
        (128, 3): (
            -0.18828832, -0.11801215, -0.06648001, -0.02156330,
            0.02156329, 0.06648005, 0.11801218, 0.18828897,
        ),
        (128, 4): (
            -0.23639172, -0.17934021, -0.14023653, -0.10881814,
            -0.08157559, -0.05678632, -0.03350975, -0.01108178,
            0.01108178, 0.03350975, 0.05678631, 0.08157560,
            0.10881804, 0.14023650, 0.17934017, 0.23639278,
        ),
        (256, 2): (-0.09420358, -0.02827190, 0.02827190, 0.09420330),
        (256, 3): (
            -0.13371243, -0.08361249, -0.04704370, -0.01524900,
            0.01524901, 0.04704368, 0.08361248, 0.13371260,
        ),
        (256, 4): (
            -0.16852295, -0.12754069, -0.09961203, -0.07719406,
            -0.05781249, -0.04021866, -0.02370371, -0.00783269,
            0.00783269, 0.02370371, 0.04021868, 0.05781246,
            0.07719407, 0.09961203, 0.12754090, 0.16852276,
        ),
    }.items()
}  # fmt: skip

_E4M3 = np.where(
    np.arange(127) < 8, np.arange(127), (8 + np.arange(127) % 8) * 2.0 ** (np.arange(127) // 8 - 1)
).astype(F) * F(2.0**-9)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """A bit stream of codes ``[..., n]``, lowest bit first: u8 ``[..., n * bits / 8]``."""
    stream = codes.astype(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    return np.packbits(stream.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def unpack(stream: np.ndarray, bits: int) -> np.ndarray:
    """Codes u8 ``[..., n]`` of a bit stream: u8 or u32 ``[..., words]``."""
    stream = np.unpackbits(np.ascontiguousarray(stream).view(np.uint8), axis=-1, bitorder="little")
    n = stream.shape[-1] // bits
    return stream.reshape(*stream.shape[:-1], n, bits) @ (1 << np.arange(bits, dtype=np.uint8))


def turbo_encode(x: np.ndarray, bits: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """mlx-swift-lm's TurboQuantKVCache of f32 ``[..., d]``: codes u32 ``[..., words]``, norms f32.

    A row over its norm, rotated by signs and a Walsh-Hadamard transform, becomes the codes of the
    nearest centroids; the norm is stored as it is. seed: `KEY_SEED` or `VALUE_SEED`.
    """
    table = TURBO_CODEBOOKS[x.shape[-1], bits]
    norms = F(np.sqrt(np.add.accumulate(x.astype(np.float64) ** 2, axis=-1)[..., -1]))
    inverse = np.where(norms > F(1e-8), 1 / np.maximum(norms, F(1e-8)), F(0))
    y = hadamard(x * (inverse[..., None] * signs(x.shape[-1], seed)))
    codes = np.searchsorted((table[1:] + table[:-1]) / F(2), y)
    return pack(codes, bits).view(np.uint32), norms


def turbo_decode(
    words: np.ndarray, norms: np.ndarray, bits: int, seed: int, stretch: np.ndarray | None = None
) -> np.ndarray:
    """Rows f32 ``[..., d]`` of `turbo_encode`.

    stretch: f32 ``[d]``, the fifth array of mlx-swift-lm's state, where its keys were calibrated:
    rotated columns were divided by it before their codes were found.
    """
    codes = unpack(words, bits)
    rows = norms[..., None] * TURBO_CODEBOOKS[codes.shape[-1], bits][codes]
    return hadamard(rows if stretch is None else rows * stretch, post=signs(codes.shape[-1], seed))


def affine_encode(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mx.quantize(x, 64, bits) of bf16 numbers in f32 ``[..., d]``: codes u32, scales and biases.

    The end of a group that is farther from 0 is made a multiple of the scale. Codes come from scale
    and bias in f32, before these are rounded to bf16 (u16 bits). Source: mlx's quantized.cpp.
    """
    groups = x.reshape(*x.shape[:-1], -1, 64)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    scale = np.maximum((high - low) / F((1 << bits) - 1), F(1e-7))
    below = np.abs(low) > np.abs(high)
    edge, scale = np.where(below, low, high), np.where(below, scale, -scale)
    steps = np.rint(edge / scale)
    scale = np.where(steps == 0, scale, edge / np.where(steps == 0, 1, steps))
    bias = np.where(steps == 0, F(0), edge)
    codes = np.clip(np.rint((groups - bias) / scale), 0, (1 << bits) - 1)
    words = pack(codes.reshape(x.shape), bits).view(np.uint32)
    return words, to_bf16(scale[..., 0]), to_bf16(bias[..., 0])


def affine_decode(
    words: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int
) -> np.ndarray:
    """Rows f32 ``[..., d]`` of `affine_encode`; mlx also rounds product and sum to bf16."""
    codes = unpack(words, bits)
    groups = codes.reshape(*scales.shape, 64)
    return (from_bf16(scales)[..., None] * groups.astype(F) + from_bf16(biases)[..., None]).reshape(
        codes.shape
    )


def _kivi_groups(x: np.ndarray, side: str) -> np.ndarray:
    """``[n, d]``, groups along axis 1: keys ``[n / 32, 32, d]``, values ``[n, 32, d / 32]``."""
    if side == "key":
        return x.reshape(-1, 32, x.shape[-1])
    return x.reshape(len(x), x.shape[-1] // 32, 32).swapaxes(1, 2)


def kivi_encode(x: np.ndarray, bits: int, side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """KIVI of f32 ``[n, d]``: codes u8 ``[n, d]``, scales and least numbers f16.

    Keys share a scale along 32 tokens (``[n / 32, d]``), values along 32 columns (``[n, d / 32]``).
    Codes come from the stored scale and least number. Source: Liu et al. 2024, arXiv:2402.02750.
    """
    groups = _kivi_groups(x, side)
    least = np.clip(groups.min(1) + F(0), -65504, 65504).astype(np.float16).astype(F)
    scale = np.clip((groups.max(1) - least) / F((1 << bits) - 1), -65504, 65504).astype(np.float16)
    step = np.where(scale == 0, F(1), scale.astype(F))
    codes = np.clip(np.rint((groups - least[:, None]) / step[:, None]), 0, (1 << bits) - 1)
    codes = codes if side == "key" else codes.swapaxes(1, 2)
    return codes.reshape(x.shape).astype(np.uint8), scale, least.astype(np.float16)


def kivi_decode(codes: np.ndarray, scales: np.ndarray, least: np.ndarray, side: str) -> np.ndarray:
    """Rows f32 ``[n, d]`` of `kivi_encode`."""
    groups = _kivi_groups(codes, side).astype(F)
    rows = scales.astype(F)[:, None] * groups + least.astype(F)[:, None]
    return (rows if side == "key" else rows.swapaxes(1, 2)).reshape(codes.shape)


def fp8_encode(x: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """The E4M3 code (OCP FP8) nearest to x / scale, ties to even, beyond 448 the largest: u8."""
    y = x / F(scale)
    size = np.minimum(np.abs(y), F(448))
    low = np.minimum(np.searchsorted(_E4M3, size, side="right") - 1, 125)
    middle = (_E4M3[low] + _E4M3[low + 1]) / F(2)
    up = (size > middle) | ((size == middle) & (low % 2 == 1))
    return (low + up + 128 * np.signbit(y)).astype(np.uint8)


def fp8_decode(codes: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """f32 numbers of E4M3 codes times their scale; codes of NaN do not occur."""
    return np.where(codes & 128, -1, 1).astype(F) * _E4M3[np.minimum(codes & 127, 126)] * F(scale)


def kv_encode(rows: np.ndarray, codec: str, *, side: str = "key", scale: float = 1.0) -> np.ndarray:
    """Pages u8 ``[p, bytes]`` of f32 rows ``[p, 64, d]``.

    codec: "turbo2" to "turbo4", "fp8", "affine4", "affine8", "kivi2" or "kivi4"; side:
    "key" or "value"; scale: of fp8.
    """
    name, bits = codec.rstrip("0123456789"), int(codec[-1])
    if codec == "fp8":
        parts = [fp8_encode(rows, scale)]
    elif name == "turbo":
        parts = list(turbo_encode(rows, bits, KEY_SEED if side == "key" else VALUE_SEED))
    elif name == "affine":
        parts = list(affine_encode(rows, bits))
    else:
        codes, *scales = kivi_encode(rows.reshape(-1, rows.shape[-1]), bits, side)
        parts = [pack(codes, bits), *scales]
    pages = [[a.tobytes() for a in np.split(part, len(rows))] for part in parts]
    joined = b"".join(b"".join(page) for page in zip(*pages, strict=True))
    return np.frombuffer(joined, np.uint8).reshape(-1, page_bytes(codec, rows.shape[-1])).copy()


def kv_decode(
    pages: np.ndarray, codec: str, head_dim: int, *, side: str = "key", scale: float = 1.0
) -> np.ndarray:
    """Rows f32 ``[p, 64, d]`` that pages of `kv_encode` stand for."""
    name, bits, p, d = codec.rstrip("0123456789"), int(codec[-1]), len(pages), head_dim
    if not p:
        return np.empty((0, PAGE, d), F)
    stream = pages[:, : PAGE * d * bits // 8].reshape(p, PAGE, d * bits // 8)
    rest = np.ascontiguousarray(pages[:, PAGE * d * bits // 8 :])
    if codec == "fp8":
        return fp8_decode(stream, scale)
    if name == "turbo":
        seed = KEY_SEED if side == "key" else VALUE_SEED
        return turbo_decode(stream, rest.view(F), bits, seed)
    scales, least = np.split(rest.view(np.uint16), 2, axis=1)
    if name == "affine":
        groups = (p, PAGE, d // 64)
        return affine_decode(stream, scales.reshape(groups), least.reshape(groups), bits)
    groups = (p * 2, d) if side == "key" else (p * PAGE, d // 32)
    scales, least = (a.view(np.float16).reshape(groups) for a in (scales, least))
    rows = kivi_decode(unpack(stream, bits).reshape(-1, d), scales, least, side)
    return rows.reshape(p, PAGE, d)
