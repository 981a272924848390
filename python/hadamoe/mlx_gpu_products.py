"""Products on MLX's GPU: the functions of `hadamoe.mlx_ops`, lazily."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from . import gpu_calls
from .gpu_calls import dtype_name
from .mlx_gpu import front, product, resident
from .packed import PackedWeight


def _rows(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1])


def hadamard(x: mx.array, *, block: int | None, pre: Any, post: Any) -> mx.array:
    """`hadamoe.ops.hadamard` (its ``inverse`` already resolved)."""
    return gpu_calls.hadamard(front(), x, block=block, pre=pre, post=post)


def dequantize(w: PackedWeight, rows: mx.array, *, dtype: mx.Dtype) -> mx.array:
    """Rows ``[..., k]`` of `hadamoe.ops.dequantize`, their rotation not undone."""
    return gpu_calls.dequantize(front(), resident(w), rows, dtype_name(dtype))


def qmatmul(x: mx.array, w: PackedWeight, *, expert: mx.array | None) -> mx.array:
    """`hadamoe.ops.qmatmul`."""
    flat = None if expert is None else _rows(expert).astype(mx.int32)
    y = product(_rows(x), resident(w), expert=flat, rotated=True)
    return y.reshape(*x.shape[:-1], *y.shape[1:])


def _sorted(y: mx.array, top: int) -> tuple[mx.array, mx.array]:
    """(values, index) of the largest of each row of f32 ``[t, n]``, through keys no two of which
    are equal: bits that grow as numbers fall, then the place."""
    y = mx.where(mx.isnan(y), -mx.inf, y)
    bits = (y + 0.0).view(mx.uint32)  # -0 becomes 0
    falling = mx.where(bits >> 31, bits, 0x7FFFFFFF - bits).astype(mx.uint64)
    keys = falling << 32 | mx.arange(y.shape[-1], dtype=mx.uint64)
    index = mx.sort(keys, -1)[:, :top].astype(mx.uint32).astype(mx.int32)
    return mx.take_along_axis(y, index, -1), index


def qmatmul_top(
    x: mx.array, w: PackedWeight, top: int, norm: mx.array | None, eps: float
) -> tuple[mx.array, mx.array]:
    """`hadamoe.ops.qmatmul_top`."""
    plans = front().plans.products
    flat = _rows(x).astype(mx.float32)
    values = product(flat, resident(w), norm=None if norm is None else (norm, eps))
    if top > plans.TOP:
        values, index = _sorted(values, top)
    else:
        values, index = gpu_calls.largest(front(), values, top)
    shape = (*x.shape[:-1], top)
    return values.reshape(shape), index.reshape(shape)
