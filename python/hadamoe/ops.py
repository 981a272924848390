"""The ops on numpy, torch and MLX arrays of the CPU; `hadamoe.mlx` has those with states for MLX.

`hadamoe.reference` says in numpy what each op means; the CPU code of op ``stem`` is
``csrc/cpu/stem.h``. Every op checks its arguments before it writes anything and raises
`ContractError` with the argument and the numbers; an instance without code raises
`UnsupportedError`. All arithmetic is f32; bf16 and f16 are storage only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _cpu
from .errors import ContractError
from .machine import MAX_THREADS, isa, isas, set_isa, set_threads, threads
from .packed import PackedWeight, instances, pack, rotated_columns, supports
from .roles import AttentionWeights, DeltaWeights, MoeWeights
from .weight import Weight

__all__ = [
    "MAX_THREADS", "AttentionWeights", "DeltaWeights", "MoeWeights", "PackedWeight", "attention",
    "attention_block", "dequantize", "gated_delta", "gated_delta_block", "hadamard", "instances",
    "isa", "isas", "moe_block", "moe_decode", "pack", "qmatmul", "qmatmul_top", "set_isa",
    "set_threads", "supports", "threads",
]  # fmt: skip


def _packed(op: str, weight: Weight | PackedWeight) -> PackedWeight:
    if isinstance(weight, PackedWeight):
        return weight
    if not isinstance(weight, Weight):
        raise ContractError(f"{op}: weight is {type(weight).__name__}, needs a Weight or pack(it)")
    return pack(weight)


def _framework(op: str, name: str, x: Any, columns: int | None = None) -> Any:
    """The module that runs ops on arrays like ``x``; None for numpy.

    Checks what a kernel cannot see: a weight's table of parts does not say how wide it is.
    """
    module = _module(x)
    if module is NotImplemented:
        kind = type(x).__name__
        raise ContractError(f"{op}: {name} is {kind}, needs a numpy, torch or MLX array")
    if name == "x" and (x.ndim == 0 or x.shape[-1] == 0):
        raise ContractError(f"{op}: x has shape {tuple(x.shape)}, needs at least one column")
    if columns is not None and x.shape[-1] != columns:
        raise ContractError(f"{op}: x has k={x.shape[-1]}, needs {columns}")
    return module


def _module(x: Any) -> Any:
    name = type(x).__module__.split(".")[0]
    if name == "torch":
        from . import torch_ops

        return torch_ops
    if name == "mlx":
        from . import mlx_ops

        return mlx_ops
    return None if isinstance(x, np.ndarray) else NotImplemented


_BLOCKS = frozenset(1 << i for i in range(15))


def hadamard(
    x: Any,
    *,
    block: int | None = None,
    pre: Any = None,
    post: Any = None,
    inverse: bool = False,
) -> Any:
    """Rotate the last axis: ``post * H(pre * x)``, H orthonormal per block, natural order.

    Args:
        x: ``[..., k]``, f32, f16 or bf16. Padded with zeros to a whole number of blocks.
        block: power of two to 16384; None splits k into its distinct powers of two, largest first.
        pre, post: f32 ``[p]`` signs, p dividing the padded k, repeated along it; None for ones.
        inverse: undo it: ``pre * H(post * x)`` (H is its own inverse).

    Returns:
        ``[..., k']`` of x's dtype, ``k' = k`` rounded up to whole blocks.

    Sources: turboquant-vllm (block 128, both signs), jang (powers of two, pre only).
    """
    if block is not None and block not in _BLOCKS:
        raise ContractError(f"hadamard: block is {block}, needs a power of two up to 16384 or None")
    if inverse:
        pre, post = post, pre
    if module := _framework("hadamard", "x", x):
        return module.hadamard(x, block=block, pre=pre, post=post)
    flat = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    y = np.empty((len(flat), rotated_columns(x.shape[-1], block)), x.dtype)
    _cpu.call("hadamard", [flat, pre, post], [y], [block or 0], [])
    return y.reshape(*x.shape[:-1], y.shape[-1])


def dequantize(weight: Weight | PackedWeight, rows: Any = None, *, dtype: Any = np.float32) -> Any:
    """Rows of a weight as numbers, its rotation undone.

    Args:
        rows: integer ``[m]``, flat row numbers (expert-major), each in ``[0, E * n)``; None for
            all. A torch or MLX array selects that framework for the result.
        dtype: of the result: f32 or f16.

    Returns:
        ``[m, in_features]``. Before un-rotation a value is ``scale * table[code] (+ bias)``, each
        operation rounded once to f32, the same bits on every instruction set.
    """
    w = _packed("dequantize", weight)
    if rows is None:
        rows = np.arange(w.experts * w.rows)
    if isinstance(rows, Sequence):
        rows = np.array(rows, None if len(rows) else np.int64)
    if module := _framework("dequantize", "rows", rows):
        return module.dequantize(w, rows, dtype=dtype)[..., : w.in_features]
    if rows.dtype.kind not in "iu":
        raise ContractError(f"dequantize: rows is {rows.dtype}, needs integers")
    try:
        dtype = np.dtype(dtype)
    except TypeError:
        raise ContractError(f"dequantize: dtype is {dtype}, needs float32 or float16") from None
    index = np.ascontiguousarray(rows, np.int64)
    y = np.empty((*index.shape, w.columns), dtype)
    inputs, flat = [w.parts, index.reshape(-1), *w.buffers], y.reshape(-1, w.columns)
    _cpu.call("dequantize", inputs, [flat], [w.columns], [])
    if w.rotation is not None:
        r = w.rotation
        y = hadamard(y, block=r.block, pre=r.pre, post=r.post, inverse=True)
    return y[..., : w.in_features]


def qmatmul(x: Any, weight: Weight | PackedWeight, *, expert: Any = None) -> Any:
    """``y = x @ W^T`` on the stored codes. Does not rotate: pass x through `hadamard` first.

    Args:
        x: ``[..., k]``, f32, f16 or bf16; k is the weight's (padded) columns.
        weight: a `Weight`, or `pack(weight)` where the same weight is used again, as on a GPU, or
            torch.compile traces the call.
        expert: integer ``[..., a]``: which experts each row of x goes through; None for one matrix.

    Returns:
        ``[..., n]``, or ``[..., a, n]`` with ``expert``; x's dtype. A row of the result never
        depends on the other rows, the number of threads or the batch.
    """
    w = _packed("qmatmul", weight)
    if module := _framework("qmatmul", "x", x, w.columns):
        return module.qmatmul(x, w, expert=expert)
    flat = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    shape = (len(flat), w.rows)
    if expert is not None:
        expert = np.ascontiguousarray(expert)
        if expert.shape[:-1] != x.shape[:-1]:
            raise ContractError(f"qmatmul: expert has shape {expert.shape}, x has {x.shape}")
        expert = expert.reshape(len(flat), -1)
        shape = (len(flat), expert.shape[1], w.rows)
    y = np.empty(shape, x.dtype)
    _cpu.call("qmatmul", [flat, w.parts, expert, *w.buffers], [y], [], [])
    return y.reshape(*x.shape[:-1], *shape[1:])


def qmatmul_top(
    x: Any, weight: Weight | PackedWeight, top: int, *, norm: Any = None, eps: float = 1e-6
) -> tuple[Any, Any]:
    """The ``top`` largest results of x through rmsnorm, the weight's rotation and the weight.

    Args:
        x: ``[..., k]``, f32, f16 or bf16, not rotated; k is the weight's in_features.
        norm: f32 ``[k]``, used as it is; None for no norm.

    Returns:
        (values f32 ``[..., top]``, largest first, index i32 ``[..., top]``); equal values by index.
    """
    w = _packed("qmatmul_top", weight)
    if module := _framework("qmatmul_top", "x", x, w.in_features):
        return module.qmatmul_top(x, norm, w, top, eps)
    signs, tables, ints = w.arguments()
    flat = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    values, index = (np.empty((len(flat), top), t) for t in (np.float32, np.int32))
    _cpu.call(
        "qmatmul_top", [flat, norm, *signs, *tables, *w.buffers], [values, index], ints, [eps]
    )
    shape = (*x.shape[:-1], top)
    return values.reshape(shape), index.reshape(shape)


def moe_decode(x: Any, moe: MoeWeights, *, top_k: int, normalize: bool = True) -> Any:
    """A whole mixture-of-experts block, any number of tokens.

    ``p = softmax(router(x))``; the top_k largest (ties: the lower index), renormalised to sum 1
    when ``normalize``; ``y = sum_k p_k * down_k(silu(gate_k(x)) * up_k(x)) +
    sigmoid(shared_gate(x)) * shared(x)``. Rotations are applied inside, once per token and once per
    inner state.

    Args:
        x: ``[..., hidden]``, f32, f16 or bf16, not rotated.

    Returns:
        y ``[..., hidden]`` of x's dtype.
    """
    if module := _framework("moe_decode", "x", x, moe.hidden_size):
        return module.moe_decode(x, moe, top_k=top_k, normalize=normalize)
    flat = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    y = np.empty_like(flat)
    signs, tables, ints = moe.arguments(top_k, normalize)
    _cpu.call("moe_decode", [flat, *signs, *tables, *moe.buffers], [y], ints, [])
    return y.reshape(x.shape)


def gated_delta(
    proj: Any,
    conv_weight: Any,
    a_log: Any,
    dt_bias: Any,
    norm: Any,
    conv_state: Any,
    state: Any,
    *,
    heads: tuple[int, int],
    head_dims: tuple[int, int],
    eps: float = 1e-6,
) -> Any:
    """One Gated DeltaNet layer between its projections; states are updated in place.

    Causal convolution and SiLU, l2-normalised q and k, the gated delta rule token by token, gated
    RMSNorm. t single calls give the same bits as one call with t tokens.

    Args:
        proj: ``[b, t, c + hv*dv + 2*hv]``: qkv (c = 2*hk*dk + hv*dv), z, b, a side by side.
        conv_weight: f32 ``[c, kernel]``.
        a_log, dt_bias: f32 ``[hv]``.
        norm: f32 ``[dv]``, used as it is.
        conv_state: f32 ``[b, c, kernel]``, the last inputs of the convolution, newest last.
        state: f32 ``[b, hv, dk, dv]``.
        heads: (hk, hv).
        head_dims: (dk, dv).

    Returns:
        y ``[b, t, hv*dv]`` of proj's dtype.

    Source: Yang et al., Gated Delta Networks, arXiv 2412.06464; transformers' qwen3_5_moe.
    """
    module = _framework("gated_delta", "proj", proj)
    if proj.ndim != 3:
        raise ContractError(f"gated_delta: proj has {proj.ndim} dimensions, needs 3")
    if module:
        return module.gated_delta(
            proj, conv_weight, a_log, dt_bias, norm, conv_state, state,
            heads=heads, head_dims=head_dims, eps=eps,
        )  # fmt: skip
    y = np.empty((*proj.shape[:2], heads[1] * head_dims[1]), proj.dtype)
    _cpu.call(
        "gated_delta",
        [np.ascontiguousarray(proj), conv_weight, a_log, dt_bias, norm],
        [y, conv_state, state],
        [*heads, *head_dims],
        [eps],
    )
    return y


def attention(
    proj: Any,
    q_norm: Any,
    k_norm: Any,
    cos: Any,
    sin: Any,
    keys: Any,
    values: Any,
    *,
    heads: int,
    past: int = 0,
    mask: Any = None,
    eps: float = 1e-6,
) -> Any:
    """Gated attention between its projections; keys and values join the caches in place.

    RMSNorm and partial rotary positions on q and k, softmax over the causal keys, times
    sigmoid(gate). A query's bits depend on neither batch, threads nor how a prompt was cut.

    Args:
        proj: ``[b, t, 2*h*d + 2*g*d]``: per head q then gate, then k, then v.
        q_norm, k_norm: f32 ``[d]``, used as they are (transformers' 1 + w).
        cos, sin: f32 ``[b, t, r]`` angles of the first r of d dimensions, r even.
        keys, values: ``[b, g, capacity, d]``, f32, bf16 or f16; written at ``past..past+t``.
        heads: h, a multiple of g.
        mask: bool ``[b, t, n]``, n >= past + t: False hides a key; None is causal. Keys hidden in
            front of a sequence (left padding) leave its bits as they would be without them.

    Returns:
        y ``[b, t, h*d]`` of proj's dtype; 0 for a query that sees no key.

    Source: transformers' Qwen3_5MoeAttention.
    """
    module = _framework("attention", "proj", proj)
    if proj.ndim != 3:
        raise ContractError(f"attention: proj has {proj.ndim} dimensions, needs 3")
    arrays = (proj, q_norm, k_norm, cos, sin, mask)
    if module:
        return module.attention(*arrays, keys, values, heads=heads, past=past, eps=eps)
    y = np.empty((*proj.shape[:2], heads * q_norm.shape[-1]), proj.dtype)
    inputs = [None if a is None else np.ascontiguousarray(a) for a in arrays]
    _cpu.call("attention", inputs, [y, keys, values], [heads, past], [eps])
    return y


def attention_block(
    x: Any,
    norm: Any,
    weights: AttentionWeights,
    q_norm: Any,
    k_norm: Any,
    cos: Any,
    sin: Any,
    keys: Any,
    values: Any,
    *,
    past: int = 0,
    mask: Any = None,
    eps: float = 1e-6,
) -> Any:
    """``x + o(attention(q, k, v of rmsnorm(x)))``: a layer's attention half in one call.

    Args:
        x: f32 ``[b, t, hidden]``, the residual stream.
        norm: f32 ``[hidden]``, used as it is (1 + w). The rest as in `attention`.

    Returns:
        f32 ``[b, t, hidden]``. Rotations are applied inside, once per token.
    """
    if module := _framework("attention_block", "x", x, weights.hidden_size):
        fixed = (cos, sin, mask), norm, weights, (q_norm, k_norm)
        return module.attention_block(x, *fixed, keys, values, past, eps)
    signs, tables, ints = weights.arguments(past)
    y = np.empty_like(x)
    inputs = [x, cos, sin, mask, norm, *signs, q_norm, k_norm, *tables, *weights.buffers]
    _cpu.call("attention_block", inputs, [y, keys, values], ints, [eps])
    return y


def gated_delta_block(
    x: Any,
    norm: Any,
    weights: DeltaWeights,
    conv_weight: Any,
    a_log: Any,
    dt_bias: Any,
    gated_norm: Any,
    conv_state: Any,
    state: Any,
    *,
    heads: tuple[int, int],
    head_dims: tuple[int, int],
    mask: Any = None,
    eps: float = 1e-6,
) -> Any:
    """``x + out(gated_delta(qkv, z, b, a of rmsnorm(x)))``: a layer's linear half in one call.

    Args:
        x: f32 ``[b, t, hidden]``, the residual stream.
        norm: f32 ``[hidden]``, used as it is (1 + w). The rest as in `gated_delta`.
        mask: bool ``[b, t]``: False makes a token's projections 0 (padding); those after a
            sequence's last True leave its states as they are. None for no padding.

    Returns:
        f32 ``[b, t, hidden]``. Rotations are applied inside, once per token.
    """
    vectors, states = (conv_weight, a_log, dt_bias, gated_norm), (conv_state, state)
    sizes = *heads, *head_dims
    if module := _framework("gated_delta_block", "x", x, weights.hidden_size):
        return module.gated_delta_block(x, mask, norm, weights, vectors, states, sizes, eps)
    signs, tables, ints = weights.arguments(*sizes)
    y = np.empty_like(x)
    inputs = [x, mask, norm, *signs, *vectors, *tables, *weights.buffers]
    _cpu.call("gated_delta_block", inputs, [y, *states], ints, [eps])
    return y


def moe_block(
    x: Any, norm: Any, moe: MoeWeights, *, top_k: int, normalize: bool = True, eps: float = 1e-6
) -> Any:
    """``x + moe_decode(rmsnorm(x))``: a layer's second half in one call.

    Args:
        x: f32 ``[..., hidden]``, the residual stream.
        norm: f32 ``[hidden]``, used as it is (1 + w). The rest as in `moe_decode`.
    """
    if module := _framework("moe_block", "x", x, moe.hidden_size):
        return module.moe_block(x, norm, moe, top_k=top_k, normalize=normalize, eps=eps)
    signs, tables, ints = moe.arguments(top_k, normalize)
    flat = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    y = np.empty_like(flat)
    _cpu.call("moe_block", [flat, norm, *signs, *tables, *moe.buffers], [y], ints, [eps])
    return y.reshape(x.shape)
