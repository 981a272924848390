"""The ops on MLX arrays, eagerly, on the CPU.

MLX lends its arrays through DLPack without a copy; each op allocates its result, evaluates it and
the inputs, and lets the native code write into it. Evaluation is what makes this eager: inside
``mx.compile`` and ``mx.vmap`` there is nothing to evaluate, and the ops raise `UnsupportedError`.
No op has a derivative.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from . import _cpu
from .errors import ContractError, UnsupportedError

#: dtypes of results, by numpy's or MLX's name.
_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def _dtype(dtype: Any) -> mx.Dtype:
    name = (
        str(dtype).removeprefix("mlx.core.")
        if isinstance(dtype, mx.Dtype)
        else np.dtype(dtype).name
    )
    if name not in _DTYPES:
        raise ContractError(f"dequantize: dtype is {name}, needs float32, float16 or bfloat16")
    return _DTYPES[name]


def _call(op: str, inputs: list, outputs: list, ints: list, floats: list) -> None:
    arrays = [a for a in (*inputs, *outputs) if isinstance(a, mx.array)]
    try:
        mx.eval(arrays)
    except ValueError as error:
        raise UnsupportedError(
            f"{op}: MLX arrays are computed eagerly on the CPU, not inside mx.compile or mx.vmap"
        ) from error
    _cpu.call(op, inputs, outputs, ints, floats)


def _rows(x: mx.array) -> mx.array:
    return mx.contiguous(x.reshape(-1, x.shape[-1]))


def _integers(op: str, name: str, a: mx.array) -> mx.array:
    if not mx.issubdtype(a.dtype, mx.integer):
        raise ContractError(f"{op}: {name} is {str(a.dtype)[9:]}, needs integers")
    return mx.contiguous(a.astype(mx.int64))


def hadamard(x: mx.array, *, block: int | None, pre: Any, post: Any) -> mx.array:
    """`hadamoe.ops.hadamard` (its ``inverse`` already resolved)."""
    k = x.shape[-1]
    y = mx.zeros((x.size // k, k if block is None else -(-k // block) * block), x.dtype)
    _call("hadamard", [_rows(x), pre, post], [y], [block or 0], [])
    return y.reshape(*x.shape[:-1], y.shape[-1])


def dequantize(w: Any, rows: mx.array, *, dtype: Any) -> mx.array:
    """`hadamoe.ops.dequantize`."""
    index = _integers("dequantize", "rows", rows).reshape(-1)
    y = mx.zeros((index.size, w.columns), _dtype(dtype))
    _call("dequantize", [w.parts, index, *w.buffers], [y], [w.columns], [])
    if w.rotation is not None:
        r = w.rotation
        y = hadamard(y, block=r.block, pre=r.post, post=r.pre)
    return y.reshape(*rows.shape, w.columns)


def qmatmul(x: mx.array, w: Any, *, expert: mx.array | None) -> mx.array:
    """`hadamoe.ops.qmatmul`."""
    flat = _rows(x)
    shape: tuple[int, ...] = (flat.shape[0], w.rows)
    if expert is not None:
        if expert.shape[:-1] != x.shape[:-1]:
            raise ContractError(f"qmatmul: expert has shape {expert.shape}, x has {x.shape}")
        shape = (flat.shape[0], expert.shape[-1], w.rows)
        expert = _integers("qmatmul", "expert", expert).reshape(shape[:2])
    y = mx.zeros(shape, x.dtype)
    _call("qmatmul", [flat, w.parts, expert, *w.buffers], [y], [], [])
    return y.reshape(*x.shape[:-1], *shape[1:])


def moe_decode(x: mx.array, moe: Any, *, top_k: int, normalize: bool) -> mx.array:
    """`hadamoe.ops.moe_decode`."""
    flat = _rows(x)
    y = mx.zeros(flat.shape, x.dtype)
    signs, tables, ints = moe.arguments(top_k, normalize)
    _call("moe_decode", [flat, *signs, *tables, *moe.buffers], [y], ints, [])
    return y.reshape(x.shape)


def gated_delta(
    proj: mx.array,
    conv_weight: mx.array,
    a_log: mx.array,
    dt_bias: mx.array,
    norm: mx.array,
    conv_state: mx.array,
    state: mx.array,
    *,
    heads: tuple[int, int],
    head_dims: tuple[int, int],
    eps: float,
) -> mx.array:
    """`hadamoe.ops.gated_delta`; writes into the memory of ``conv_state`` and ``state``.

    MLX does not know of that write: give states no other array shares memory with.
    """
    b, t, _ = proj.shape
    y = mx.zeros((b, t, heads[1] * head_dims[1]), proj.dtype)
    inputs = [mx.contiguous(a) for a in (proj, conv_weight, a_log, dt_bias, norm)]
    ints = [*heads, *head_dims]
    _call("gated_delta", inputs, [y, conv_state, state], ints, [eps])
    return y


def _lent(*arrays: Any) -> list:
    return [mx.contiguous(a) if isinstance(a, mx.array) else a for a in arrays]


def attention(
    proj: mx.array,
    q_norm: Any,
    k_norm: Any,
    cos: Any,
    sin: Any,
    mask: Any,
    keys: mx.array,
    values: mx.array,
    *,
    heads: int,
    past: int,
    eps: float,
) -> mx.array:
    """`hadamoe.ops.attention`; writes into the memory of ``keys`` and ``values`` (see
    `gated_delta`)."""
    y = mx.zeros((*proj.shape[:2], heads * q_norm.shape[-1]), proj.dtype)
    inputs = _lent(proj, q_norm, k_norm, cos, sin, mask)
    _call("attention", inputs, [y, keys, values], [heads, past], [eps])
    return y


def attention_block(
    x: mx.array,
    per_token: tuple,
    norm: Any,
    signs: list,
    norms: tuple,
    tables: list,
    buffers: tuple,
    keys: mx.array,
    values: mx.array,
    ints: list[int],
    eps: float,
) -> mx.array:
    """`hadamoe.ops.attention_block`; writes into ``keys`` and ``values``."""
    y = mx.zeros(x.shape, x.dtype)
    inputs = _lent(x, *per_token, norm, *signs, *norms, *tables, *buffers)
    _call("attention_block", inputs, [y, keys, values], ints, [eps])
    return y


def gated_delta_block(
    x: mx.array,
    mask: Any,
    norm: Any,
    signs: list,
    vectors: tuple,
    tables: list,
    buffers: tuple,
    conv_state: mx.array,
    state: mx.array,
    ints: list[int],
    eps: float,
) -> mx.array:
    """`hadamoe.ops.gated_delta_block`; writes into ``conv_state`` and ``state``."""
    y = mx.zeros(x.shape, x.dtype)
    inputs = _lent(x, mask, norm, *signs, *vectors, *tables, *buffers)
    _call("gated_delta_block", inputs, [y, conv_state, state], ints, [eps])
    return y


def moe_block(
    x: mx.array, norm: Any, signs: list, tables: list, buffers: tuple, ints: list[int], eps: float
) -> mx.array:
    """`hadamoe.ops.moe_block`."""
    flat = _rows(x)
    y = mx.zeros(flat.shape, x.dtype)
    _call("moe_block", [flat, *_lent(norm, *signs, *tables, *buffers)], [y], ints, [eps])
    return y.reshape(x.shape)


def qmatmul_top(
    x: mx.array, norm: Any, signs: tuple, w: Any, top: int, block: int, eps: float
) -> tuple[mx.array, mx.array]:
    """`hadamoe.ops.qmatmul_top`."""
    flat = _rows(x)
    value, index = (mx.zeros((flat.shape[0], top), t) for t in (mx.float32, mx.int32))
    inputs = [flat, *_lent(norm, *signs, w.parts, *w.buffers)]
    _call("qmatmul_top", inputs, [value, index], [block], [eps])
    shape = (*x.shape[:-1], top)
    return value.reshape(shape), index.reshape(shape)
