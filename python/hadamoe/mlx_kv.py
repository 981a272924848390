"""Pages of the quantized KV cache in MLX: lazy, on any of MLX's devices.

The bytes are those of `hadamoe.kv_ops.kv_encode`: the same steps in f32, one rounding each. On a
GPU they are one kernel (`hadamoe.mlx_gpu_kv`). On the CPU the native op decodes, lazily
where `hadamoe.mlx` is lazy, and encodes the codecs of other software. All else is MLX's operations:
encoding (the native op refuses NaN, a lazy operation keeps it), ``vectors``, and our own codecs
where native ops are eager, so that they can be traced. A GPU may sum MLX's transform in another
order; then a number on a code's edge may get the code beside it, and a scale its neighbour in f16.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np

from . import mlx_gpu, mlx_gpu_kv
from .kv import CODECS, KEY_SEED, PAGE, VALUE_SEED, page_bytes, signs
from .mlx_host import Output, call, route
from .reference_kv import bits_of, table

__all__ = ["kv_decode", "kv_encode"]

_AFFINE_GROUP = 64  # columns that share a scale
_SCALE = np.ones(1, np.float32)  # of fp8


def _in_mlx(codec: str) -> bool:
    """Whether the codec is there in MLX's operations."""
    return bool(bits_of(codec)) or codec == "bf16" or codec.startswith("affine")


def _native(op: str, x: mx.array, codec: str, side: str, d: int, result: Output) -> mx.array:
    seed = KEY_SEED if side == "key" else VALUE_SEED
    inputs, ints = [x, signs(d, seed), None, None, _SCALE], [CODECS[codec], int(side == "value")]
    return call(op, inputs, [result.kept], [result], ints=ints)[0]


def kv_encode(rows: mx.array, codec: str, *, side: str, vectors: tuple | None = None) -> mx.array:
    """Whole pages as bytes.

    Args:
        rows: f32, f16 or bf16 ``[..., 64, d]``.
        side: "key" or "value".
        vectors: (mean, balance) f32, shapes that broadcast to rows; codecs ``h*`` store
            (x - mean) * balance.

    Returns:
        u8 ``[..., bytes]``. NaN: a row with one (affine: a group) is read back as NaN, the others
        as ever.

    Raises:
        ContractError: NaN, from ``mx.eval``, in codecs of other software on the CPU.
    """
    *lead, _, d = rows.shape
    if vectors is None and mlx_gpu.available():
        return mlx_gpu_kv.kv_encode(rows, codec, side=side)
    if not _in_mlx(codec):
        pages = Output(0, len(lead), (page_bytes(codec, d),), mx.uint8)
        return _native("kv_encode", rows.astype(mx.float32), codec, side, d, pages)
    if codec == "bf16":
        parts = [rows.astype(mx.bfloat16)]
    elif bits := bits_of(codec):
        rows = rows.astype(mx.float32)
        if vectors is not None:
            rows = (rows - vectors[0]) * vectors[1]
        codes, nu = (_encode_8 if bits == 8 else _encode)(rows * _signs(side, d), rows, bits)
        parts = [_pack(codes, bits, side), nu.astype(mx.float16)]
    else:
        flat = rows.astype(mx.float32).reshape(-1, d)
        codes, scale, bias = mx.quantize(flat, group_size=_AFFINE_GROUP, bits=int(codec[6:]))
        lost = mx.isnan(flat.reshape(*bias.shape, _AFFINE_GROUP)).any(axis=-1)
        bias = mx.where(lost, float("nan"), bias)  # quantize drops NaN
        parts = [codes, scale.astype(mx.bfloat16), bias.astype(mx.bfloat16)]
    return mx.concatenate([p.view(mx.uint8).reshape(*lead, -1) for p in parts], axis=-1)


def kv_decode(
    pages: mx.array,
    codec: str,
    head_dim: int,
    *,
    side: str,
    vectors: tuple | None = None,
    dtype: mx.Dtype = mx.float32,
) -> mx.array:
    """What pages of `kv_encode` stand for, rotation undone.

    Args:
        pages: u8 ``[..., bytes]``.

    Returns:
        ``[..., 64, head_dim]`` of ``dtype``, computed in f32.
    """
    if vectors is None and mlx_gpu.available():
        return mlx_gpu_kv.kv_decode(pages, codec, head_dim, side=side, dtype=dtype)
    return _decoded(pages, codec, head_dim, side, vectors).astype(dtype)


def _decoded(pages: mx.array, codec: str, d: int, side: str, vectors: tuple | None) -> mx.array:
    lead = pages.shape[:-1]
    if not _in_mlx(codec) or (vectors is None and route() == "lazy"):
        rows = Output(0, len(lead), (PAGE, d), mx.float32)
        return _native("kv_decode", pages, codec, side, d, rows)
    if codec == "bf16":
        return pages.view(mx.bfloat16).reshape(*lead, PAGE, d).astype(mx.float32)
    bits = bits_of(codec) or int(codec[6:])
    codes, scales = mx.split(pages, [PAGE * d * bits // 8], axis=-1)
    if codec.startswith("affine"):
        groups = scales.view(mx.bfloat16).astype(mx.float32).reshape(*lead, 2, -1)
        flat = [a.reshape(-1, d // _AFFINE_GROUP) for a in mx.split(groups, 2, axis=-2)]
        words = codes.view(mx.uint32).reshape(-1, d * bits // 32)
        rows = mx.dequantize(words, *flat, group_size=_AFFINE_GROUP, bits=bits)
        return rows.reshape(*lead, PAGE, d)
    codes = _unpack(codes, bits, side, d)
    nu = scales.view(mx.float16).astype(mx.float32)[..., None]
    if bits == 8:
        y = (codes.astype(mx.float32) - 128) * nu
    else:
        levels, _, kappa = _table(bits)
        y = levels[codes] * (nu * float(_root(d) / kappa))
    x = mx.hadamard_transform(y, scale=1.0) * float(_root(d)) * _signs(side, d)
    return x if vectors is None else x / vectors[1] + vectors[0]


@cache
def _signs(side: str, d: int) -> mx.array:
    return mx.array(signs(d, KEY_SEED if side == "key" else VALUE_SEED))


@cache
def _table(bits: int) -> tuple[mx.array, list[float], np.float32]:
    levels, mids, kappa = table(bits)
    return mx.array(levels.astype(np.float32)), [float(m) for m in mids], kappa


def _root(d: int) -> np.float32:
    return np.float32(1 / np.sqrt(d))


def _lane_sum(x: mx.array) -> mx.array:
    """f32 sum of the last axis in the kernels' order: 32 lanes, joined by xor of 16, 8, 4, 2, 1."""
    lanes = x.reshape(*x.shape[:-1], -1, 32)
    total = lanes[..., 0, :]
    for i in range(1, lanes.shape[-2]):
        total = total + lanes[..., i, :]
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total


def _encode(signed: mx.array, x: mx.array, bits: int) -> tuple[mx.array, mx.array]:
    d = x.shape[-1]
    levels, mids, kappa = _table(bits)
    norm = mx.sqrt(_lane_sum(x * x))
    none = norm == 0  # not true of NaN, which must stay
    v = mx.hadamard_transform(signed, scale=1.0) * mx.where(none, 0, 1 / norm) * float(kappa)
    codes = sum((v > mid).astype(mx.uint8) for mid in mids)
    dot = _lane_sum(v * levels[codes])
    nu = norm * float(np.float32(d) * kappa * kappa) / mx.where(dot <= 0, 1, dot)
    return codes, mx.minimum(mx.where(none, 0, nu), 65504)


def _encode_8(signed: mx.array, x: mx.array, bits: int) -> tuple[mx.array, mx.array]:
    y = mx.hadamard_transform(signed, scale=1.0) * float(_root(x.shape[-1]))
    nu = mx.minimum(mx.abs(y).max(axis=-1, keepdims=True) / 127, 65504).astype(mx.float16)
    unit = mx.where(nu == 0, float("inf"), nu.astype(mx.float32))
    level = mx.clip(mx.round(y / unit), -127, 127)
    return (level + 128).astype(mx.uint8), nu


def _planes(bits: int) -> list[tuple[int, int]]:
    """(lowest bit, width) of what a tile keeps one after the other."""
    return [(0, 2), (2, 1)] if bits == 3 else [(0, bits)]


def _shifts(width: int) -> mx.array:
    return mx.array(np.arange(0, 8, width, np.uint8)[:, None])


def _pack(codes: mx.array, bits: int, side: str) -> mx.array:
    """Codes u8 ``[..., 64, d]`` -> bytes in the order of ``csrc/core/kv_codecs.h``."""
    lanes = codes if side == "key" else codes.swapaxes(-1, -2)
    *lead, count, terms = lanes.shape
    tiles = lanes.reshape(*lead, count // 16, 16, terms // 32, 32).swapaxes(-2, -3)
    parts = []
    for low, width in _planes(bits):
        fields = (tiles >> low) & ((1 << width) - 1)
        fields = fields.reshape(*tiles.shape[:-1], width, 8 // width, 4) << _shifts(width)
        words = fields.sum(axis=-2).astype(mx.uint8).swapaxes(-2, -3)
        parts.append(words.reshape(*tiles.shape[:-2], width * 64))
    return mx.concatenate(parts, axis=-1)


def _unpack(data: mx.array, bits: int, side: str, d: int) -> mx.array:
    """Codes u8 ``[..., 64, d]`` of `_pack`."""
    lead = data.shape[:-1]
    blocks, terms = (PAGE // 16, d) if side == "key" else (d // 16, PAGE)
    data = data.reshape(*lead, blocks, terms // 32, bits * 64)
    tiles = None
    for low, width in _planes(bits):
        words, data = mx.split(data, [width * 64], axis=-1)
        words = words.reshape(*lead, blocks, terms // 32, width, 16, 1, 4).swapaxes(-3, -4)
        fields = (words >> _shifts(width)) & ((1 << width) - 1)
        fields = fields.reshape(*lead, blocks, terms // 32, 16, 32) << low
        tiles = fields if tiles is None else tiles | fields
    lanes = tiles.swapaxes(-2, -3).reshape(*lead, blocks * 16, terms)
    return lanes if side == "key" else lanes.swapaxes(-1, -2)
