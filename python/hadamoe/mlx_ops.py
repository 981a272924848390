"""The ops on MLX arrays: functions that `hadamoe.ops` calls; their meaning is documented there.

No op has a derivative. `hadamoe.mlx` has them all, and those with states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from . import mlx_gpu_moe, mlx_gpu_products
from .errors import ContractError, UnsupportedError
from .mlx_host import Output, call, integers
from .packed import rotated_columns

#: dtypes of results, by numpy's or MLX's name.
_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def _writes(op: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise UnsupportedError(f"{op}: MLX arrays are not written in place; use hadamoe.mlx.{op}")

    return refuse


#: In `hadamoe.ops` these write their states; MLX may share an array's memory with others.
attention, attention_block, gated_delta, gated_delta_block = map(
    _writes, ("attention", "attention_block", "gated_delta", "gated_delta_block")
)


def _dtype(dtype: Any) -> mx.Dtype:
    name = (
        str(dtype).removeprefix("mlx.core.")
        if isinstance(dtype, mx.Dtype)
        else np.dtype(dtype).name
    )
    if name not in _DTYPES:
        raise ContractError(f"dequantize: dtype is {name}, needs float32, float16 or bfloat16")
    return _DTYPES[name]


def _rowwise(
    op: str,
    x: mx.array,
    columns: int,
    rest: list,
    ints: Sequence[int] = (),
    floats: Sequence[float] = (),
    gpu: Callable[[], mx.array] | None = None,
) -> mx.array:
    """An op of ``x [..., k]`` with a result ``[..., columns]``; a row depends on no other."""
    rows = x.ndim - 1
    y = Output(0, rows, (columns,), x.dtype)
    kernels = None if gpu is None else lambda: [gpu()]
    return call(op, [x, *rest], [rows], [y], (), ints, floats, kernels)[0]


def hadamard(x: mx.array, *, block: int | None, pre: Any, post: Any) -> mx.array:
    """`hadamoe.ops.hadamard` (its ``inverse`` already resolved)."""

    def gpu() -> mx.array:
        return mlx_gpu_products.hadamard(x, block=block, pre=pre, post=post)

    columns = rotated_columns(x.shape[-1], block)
    return _rowwise("hadamard", x, columns, [pre, post], [block or 0], gpu=gpu)


def dequantize(w: Any, rows: mx.array, *, dtype: Any) -> mx.array:
    """`hadamoe.ops.dequantize`."""
    index = integers("dequantize", "rows", rows).astype(mx.int64)
    numbers = Output(1, index.ndim, (w.columns,), _dtype(dtype))

    def gpu() -> list[mx.array]:
        narrow = (rows if isinstance(rows, mx.array) else index).astype(mx.int32)
        return [mlx_gpu_products.dequantize(w, narrow, dtype=numbers.dtype)]

    inputs = [w.parts, index, *w.buffers]
    y = call("dequantize", inputs, [-1, index.ndim], [numbers], ints=[w.columns], gpu=gpu)[0]
    r = w.rotation
    return y if r is None else hadamard(y, block=r.block, pre=r.post, post=r.pre)


def qmatmul(x: mx.array, w: Any, *, expert: mx.array | None) -> mx.array:
    """`hadamoe.ops.qmatmul`."""

    def gpu() -> list[mx.array]:
        return [mlx_gpu_products.qmatmul(x, w, expert=expert)]

    rows = x.ndim - 1
    y = Output(0, rows, (w.rows,), x.dtype)
    if expert is not None:
        expert = integers("qmatmul", "expert", expert)
        if expert.shape[:-1] != x.shape[:-1]:
            raise ContractError(f"qmatmul: expert has shape {expert.shape}, x has {x.shape}")
        y = Output(2, rows + 1, (w.rows,), x.dtype)
    inputs = [x, w.parts, expert, *w.buffers]
    return call("qmatmul", inputs, [rows, -1, rows], [y], gpu=gpu)[0]


def qmatmul_top(x: mx.array, norm: Any, w: Any, top: int, eps: float) -> tuple[mx.array, mx.array]:
    """`hadamoe.ops.qmatmul_top`."""

    def gpu() -> tuple[mx.array, mx.array]:
        gamma = None if norm is None else mx.array(norm)
        return mlx_gpu_products.qmatmul_top(x, w, top, gamma, eps)

    rows = x.ndim - 1
    outputs = [Output(0, rows, (top,), t) for t in (mx.float32, mx.int32)]
    signs, tables, ints = w.arguments()
    inputs = [x, norm, *signs, *tables, *w.buffers]
    value, index = call("qmatmul_top", inputs, [rows], outputs, (), ints, [eps], gpu)
    return value, index


def moe_decode(x: mx.array, moe: Any, *, top_k: int, normalize: bool) -> mx.array:
    """`hadamoe.ops.moe_decode`."""

    def gpu() -> mx.array:
        return mlx_gpu_moe.moe_decode(x, moe, top_k=top_k, normalize=normalize)

    signs, tables, ints = moe.arguments(top_k, normalize)
    rest = [*signs, *tables, *moe.buffers]
    return _rowwise("moe_decode", x, x.shape[-1], rest, ints, gpu=gpu)


def moe_block(
    x: mx.array, norm: Any, moe: Any, *, top_k: int, normalize: bool, eps: float
) -> mx.array:
    """`hadamoe.ops.moe_block`."""

    def gpu() -> mx.array:
        gamma = norm if isinstance(norm, mx.array) else mx.array(norm)
        return mlx_gpu_moe.moe_block(x, gamma, moe, top_k=top_k, normalize=normalize, eps=eps)

    signs, tables, ints = moe.arguments(top_k, normalize)
    rest = [norm, *signs, *tables, *moe.buffers]
    return _rowwise("moe_block", x, x.shape[-1], rest, ints, [eps], gpu)
