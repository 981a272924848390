"""Random weights of every compiled instance, and the storage conversions they need."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .. import reference
from ..bf16 import from_bf16, to_bf16
from ..weight import Instance, Part, Weight

# ---- storage dtypes (bf16 travels as u16 bits) ----


def to_storage(x: np.ndarray, dtype: str) -> np.ndarray:
    """f32 -> ``f32``, ``f16`` bits or ``bf16`` bits (u16), as a weight's scales are stored."""
    if dtype == "f32":
        return np.ascontiguousarray(x, np.float32)
    return to_bf16(x) if dtype == "bf16" else np.ascontiguousarray(x, np.float16).view(np.uint16)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """f64 -> the nearest number of ``dtype``, as f64 (through f32, as a kernel's store does)."""
    f = np.asarray(x, np.float64).astype(np.float32)
    if dtype == "bf16":
        return from_bf16(to_bf16(f)).astype(np.float64)
    return f.astype(np.float16 if dtype == "f16" else np.float32).astype(np.float64)


# ---- random weights of one instance ----


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes ``[rows, k]`` -> u8 ``[rows, ceil(k * bits / 8)]``, a little-endian stream per row."""
    stream = (codes[..., None].astype(np.uint32) >> np.arange(bits, dtype=np.uint32)) & 1
    return np.packbits(
        stream.reshape(codes.shape[0], -1).astype(np.uint8), axis=1, bitorder="little"
    )


def pack_gguf(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """E2M1 codes ``[rows, k]``, E8M0 ``[rows, k / 32]`` -> GGUF blocks ``[rows, 17 * k / 32]``."""
    rows, k = codes.shape
    c = codes.reshape(rows, k // 32, 2, 16).astype(np.uint8)
    block = np.concatenate([scale[..., None], c[:, :, 0] | c[:, :, 1] << 4], axis=2)
    return np.ascontiguousarray(block.reshape(rows, -1))


def _scale(
    rng: np.random.Generator, inst: Instance, shape: tuple[int, int], kind: str
) -> np.ndarray:
    if inst.scale == "e8m0":
        return (
            rng.integers(126, 129, shape, np.uint8)
            if kind == "integer"
            else (rng.integers(118, 124, shape, np.uint8))
        )
    if kind == "integer":
        s = 2.0 ** rng.integers(-1, 2, shape)
    else:
        s = 0.02 * np.exp(0.5 * rng.standard_normal(shape))
    if inst.table == "linear_signed":  # half of AutoRound's scales are negative
        s = s * rng.choice([-1.0, 1.0], shape)
    return to_storage(s, inst.scale)


def _placed(rng: np.random.Generator, array: np.ndarray | None) -> np.ndarray | None:
    """The array in memory of its own, half of the time at an odd address: MLX does not align."""
    if array is None or rng.random() < 0.5:
        return array
    shifted = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    shifted[...] = array
    return shifted


def random_part(
    rng: np.random.Generator,
    inst: Instance,
    rows: int,
    columns: int,
    group: int,
    kind: str = "integer",
) -> Part:
    """A part with random codes, scales, biases and codebook; every code occurs, rows allowing."""
    if inst.table == "plain":
        w = (
            rng.integers(-8, 9, (rows, columns))
            if kind == "integer"
            else (0.05 * rng.standard_normal((rows, columns)))
        )
        raw = to_storage(w.astype(np.float32), inst.scale)
        return Part(inst, rows, columns, _placed(rng, raw.view(np.uint8).reshape(rows, -1)))
    codes = rng.integers(0, 1 << inst.bits, (rows, columns))
    scale = _scale(rng, inst, (rows, columns // group), kind)
    if inst.table == "e2m1_gguf":
        return Part(inst, rows, group, _placed(rng, pack_gguf(codes, scale)))
    bias = codebook = None
    if inst.table == "linear":
        b = (
            rng.integers(-8, 9, scale.shape)
            if kind == "integer"
            else (-0.02 * (1 << inst.bits) / 2 * rng.random(scale.shape))
        )
        bias = to_storage(b, inst.scale)
    if inst.table == "codebook":
        size = 1 << inst.bits
        codebook = (
            (rng.permutation(4 * size)[:size] - 2 * size) * 0.5
            if kind == "integer"
            else (np.sort(rng.standard_normal(size)))
        )
        codebook = np.ascontiguousarray(codebook, np.float32)
    arrays = [_placed(rng, a) for a in (pack_bits(codes, inst.bits), scale, bias)]
    return Part(inst, rows, group, *arrays, codebook)


def plain_part(w: np.ndarray) -> Part:
    """f32 ``[rows, columns]`` stored as it is."""
    raw = np.ascontiguousarray(w, np.float32).view(np.uint8).reshape(len(w), -1)
    return Part(Instance("plain", 32, "f32"), len(w), w.shape[1], raw)


def groups_of(inst: Instance, columns: int) -> list[int]:
    """Group sizes worth testing for ``columns``; the last is one scale per row."""
    if inst.table == "plain":
        return [columns]
    if inst.scale == "e8m0":
        return [32]
    return [g for g in (32, 64, 128) if columns % g == 0 and columns > g] + [columns]


def random_weight(
    rng: np.random.Generator,
    inst: Instance | list[Instance],
    rows: int | list[int],
    columns: int,
    *,
    group: int = 0,
    experts: int = 1,
    kind: str = "integer",
) -> Weight:
    """A weight of ``experts`` experts, part i with ``rows[i]`` rows of ``inst[i % len(inst)]``.

    ``group`` 0 takes the smallest that the instance and ``columns`` allow.
    """
    insts = [inst] if isinstance(inst, Instance) else list(inst)
    sizes = [rows] if isinstance(rows, int) else list(rows)
    grid = []
    for e in range(experts):
        line = []
        for i, n in enumerate(sizes):
            one = insts[(e + i) % len(insts)]
            line.append(
                random_part(rng, one, n, columns, group or groups_of(one, columns)[0], kind)
            )
        grid.append(tuple(line))
    return Weight(columns, tuple(grid))


def magnitude(weight: Weight) -> Weight:
    """The weight whose |values| bound the terms a kernel may add: |scale|, |bias|, |codebook|."""

    def absolute(a: np.ndarray | None, dtype: str) -> np.ndarray | None:
        if a is None or dtype == "e8m0":
            return a
        return np.abs(a) if dtype == "f32" else a & 0x7FFF

    def one(p: Part) -> Part:
        scale, bias = (absolute(a, p.instance.scale) for a in (p.scale, p.bias))
        book = None if p.codebook is None else np.abs(p.codebook)
        return replace(p, scale=scale, bias=bias, codebook=book)

    return replace(weight, parts=tuple(tuple(one(p) for p in e) for e in weight.parts))


def values(weight: Weight) -> np.ndarray:
    """The stored numbers, f64 ``[experts, rows, columns]``."""
    rows = np.arange(weight.experts * weight.rows)
    w = reference.dequantize(weight, rows).astype(np.float64)
    return w.reshape(weight.experts, weight.rows, weight.columns)


def slice_rows(part: Part, begin: int, end: int) -> Part:
    """Rows [begin, end) of a part; views, nothing is copied."""
    end = min(end, part.rows)
    scale, bias = (None if a is None else a[begin:end] for a in (part.scale, part.bias))
    return replace(part, rows=end - begin, codes=part.codes[begin:end], scale=scale, bias=bias)
