"""The ops on MLX arrays: functions that `hadamoe.ops` calls; their meaning is documented there.

No op has a derivative. `hadamoe.mlx` has them all, and those with states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from . import mlx_host, mlx_metal, mlx_metal_products
from .errors import ContractError, UnsupportedError
from .mlx_host import Output, call, integers

#: dtypes of results, by numpy's or MLX's name.
_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def route() -> Literal["metal", "lazy", "eager"]:
    """How a call now would run: as Metal kernels, where there are some for the op; by the primitive
    of `_mlx` on the CPU; or at once, on the CPU (`hadamoe.mlx_host`)."""
    if mlx_metal.available():
        return "metal"
    return "eager" if mlx_host.bridge is None else "lazy"


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


def _rowwise(op: str, x: mx.array, columns: int, rest: list, ints: list, floats: list) -> mx.array:
    """An op of ``x [..., k]`` with a result ``[..., columns]``; a row depends on no other."""
    rows = x.ndim - 1
    y = Output(0, rows, (columns,), x.dtype)
    return call(op, [x, *rest], [rows], [y], ints=ints, floats=floats)[0]


def hadamard(x: mx.array, *, block: int | None, pre: Any, post: Any) -> mx.array:
    """`hadamoe.ops.hadamard` (its ``inverse`` already resolved)."""
    if mlx_metal.available():
        return mlx_metal_products.hadamard(x, block=block, pre=pre, post=post)
    k = x.shape[-1]
    columns = k if block is None else -(-k // block) * block
    return _rowwise("hadamard", x, columns, [pre, post], [block or 0], [])


def dequantize(w: Any, rows: mx.array, *, dtype: Any) -> mx.array:
    """`hadamoe.ops.dequantize`."""
    index = integers("dequantize", "rows", rows).astype(mx.int64)
    if mlx_metal.available():
        return mlx_metal_products.dequantize(w, index, dtype=_dtype(dtype))
    numbers = Output(1, index.ndim, (w.columns,), _dtype(dtype))
    inputs = [w.parts, index, *w.buffers]
    y = call("dequantize", inputs, [-1, index.ndim], [numbers], ints=[w.columns])[0]
    r = w.rotation
    return y if r is None else hadamard(y, block=r.block, pre=r.post, post=r.pre)


def qmatmul(x: mx.array, w: Any, *, expert: mx.array | None) -> mx.array:
    """`hadamoe.ops.qmatmul`."""
    if mlx_metal.available():
        return mlx_metal_products.qmatmul(x, w, expert=expert)
    if expert is None:
        return _rowwise("qmatmul", x, w.rows, [w.parts, None, *w.buffers], [], [])
    expert = integers("qmatmul", "expert", expert)
    if expert.shape[:-1] != x.shape[:-1]:
        raise ContractError(f"qmatmul: expert has shape {expert.shape}, x has {x.shape}")
    rows = x.ndim - 1
    y = Output(2, rows + 1, (w.rows,), x.dtype)
    return call("qmatmul", [x, w.parts, expert, *w.buffers], [rows, -1, rows], [y])[0]


def qmatmul_top(
    x: mx.array, norm: Any, signs: tuple, w: Any, top: int, block: int, eps: float
) -> tuple[mx.array, mx.array]:
    """`hadamoe.ops.qmatmul_top`."""
    rows = x.ndim - 1
    outputs = [Output(0, rows, (top,), t) for t in (mx.float32, mx.int32)]
    inputs = [x, norm, *signs, w.parts, *w.buffers]
    value, index = call("qmatmul_top", inputs, [rows], outputs, ints=[block], floats=[eps])
    return value, index


def moe_decode(x: mx.array, moe: Any, *, top_k: int, normalize: bool) -> mx.array:
    """`hadamoe.ops.moe_decode`."""
    signs, tables, ints = moe.arguments(top_k, normalize)
    return _rowwise("moe_decode", x, x.shape[-1], [*signs, *tables, *moe.buffers], ints, [])


def moe_block(
    x: mx.array, norm: Any, signs: list, tables: list, buffers: tuple, ints: list[int], eps: float
) -> mx.array:
    """`hadamoe.ops.moe_block`."""
    return _rowwise("moe_block", x, x.shape[-1], [norm, *signs, *tables, *buffers], ints, [eps])
