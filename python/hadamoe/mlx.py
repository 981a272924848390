"""The ops on MLX arrays, as functions without side effects: states in, new states out.

    from hadamoe import mlx, ops
    y = mlx.qmatmul(x, ops.pack(weight))
    y, conv_state, state = mlx.gated_delta(proj, *vectors, conv_state, state, heads=..., ...)

`route` says how they run. "metal", "cuda": lazy kernels, where MLX computes on a GPU and an op has
them. "lazy", on the CPU where `_mlx` was built for the installed MLX (``HM_MLX=1 pip install .``):
native ops inside ``mx.compile`` and ``mx.vmap``, on any stream; a state nobody else holds is
updated where it is. "eager": native ops at once (`hadamoe.mlx_host`). No op has a derivative: the
CPU's refuse it by name, MLX refuses that of a kernel.

Arguments are MLX arrays; what stays the same from call to call (norms, weights of convolutions)
may be numpy's, which costs less and is never copied. Errors as in `hadamoe.ops`: wrong shapes,
dtypes and weights are refused at once, wrong numbers in arrays by ``mx.eval``, on the CPU.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from . import mlx_gpu_delta
from .errors import ContractError
from .mlx_host import Output, call, integers, route
from .ops import dequantize, hadamard, moe_block, moe_decode, qmatmul, qmatmul_top
from .roles import AttentionWeights, DeltaWeights

__all__ = [
    "attention", "attention_block", "dequantize", "gated_delta", "gated_delta_block", "hadamard",
    "moe_block", "moe_decode", "qmatmul", "qmatmul_top", "route",
]  # fmt: skip


def gated_delta(
    proj: mx.array,
    conv_weight: Any,
    a_log: Any,
    dt_bias: Any,
    norm: Any,
    conv_state: mx.array,
    state: mx.array,
    *,
    heads: tuple[int, int],
    head_dims: tuple[int, int],
    eps: float = 1e-6,
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """(y, conv_state, state) of `hadamoe.ops.gated_delta`; arguments as there.

    Args:
        mask: bool ``[b, t]``: False makes a token's projections 0; those after a sequence's last
            True leave its states as they are, with y = 0. None for no padding.
        lengths: integers ``[b]``: tokens each sequence has, the rest leave its states as they are;
            None: as mask says.
    """
    counts = _counts("gated_delta", proj, mask, lengths)
    vectors, states = (conv_weight, a_log, dt_bias, norm), (conv_state, state)

    def gpu() -> tuple[mx.array, ...]:
        options = {"heads": heads, "head_dims": head_dims, "eps": eps}
        return mlx_gpu_delta.gated_delta(
            proj, *map(_array, vectors), *states, **options, mask=mask, lengths=counts
        )

    real = proj if mask is None else mx.where(mask[..., None], proj, mx.array(0, proj.dtype))
    y = Output(0, 2, (heads[1] * head_dims[1],), proj.dtype)
    inputs = [real, *vectors, None if counts is None else counts.astype(mx.int64)]
    ints, leads = [*heads, *head_dims], [1, -1, -1, -1, -1, 1]
    return tuple(call("gated_delta", inputs, leads, [y], states, ints, [eps], gpu))


def gated_delta_block(
    x: mx.array,
    norm: Any,
    weights: DeltaWeights,
    conv_weight: Any,
    a_log: Any,
    dt_bias: Any,
    gated_norm: Any,
    conv_state: mx.array,
    state: mx.array,
    *,
    heads: tuple[int, int],
    head_dims: tuple[int, int],
    eps: float = 1e-6,
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """(y, conv_state, state) of `hadamoe.ops.gated_delta_block`; mask and lengths as in
    `gated_delta`."""
    vectors, states = (conv_weight, a_log, dt_bias, gated_norm), (conv_state, state)
    counts = _counts("gated_delta_block", x, mask, lengths)

    def gpu() -> tuple[mx.array, ...]:
        fixed = _array(norm), weights, *map(_array, vectors)
        options = {"heads": heads, "head_dims": head_dims, "eps": eps, "mask": mask}
        return mlx_gpu_delta.gated_delta_block(x, *fixed, *states, **options, lengths=counts)

    there = mask  # for the native op it ends where a sequence does
    if lengths is not None:
        there = mx.arange(x.shape[1]) < counts[:, None]
        there = there if mask is None else mask & there
    signs, tables, ints = weights.arguments(*heads, *head_dims)
    inputs = [x, there, norm, *signs, *vectors, *tables, *weights.buffers]
    y = Output(0, 2, (weights.hidden_size,), mx.float32)
    return tuple(call("gated_delta_block", inputs, [1, 1], [y], states, ints, [eps], gpu))


def attention(
    proj: mx.array,
    q_norm: Any,
    k_norm: Any,
    cos: mx.array,
    sin: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    heads: int,
    past: int = 0,
    mask: mx.array | None = None,
    eps: float = 1e-6,
) -> tuple[mx.array, mx.array, mx.array]:
    """(y, keys, values) of `hadamoe.ops.attention`; arguments as there."""
    y = Output(0, 2, (heads * keys.shape[-1],), proj.dtype)
    inputs, leads = [proj, q_norm, k_norm, cos, sin, mask], [1, -1, -1, 1, 1, 1]
    return tuple(call("attention", inputs, leads, [y], (keys, values), [heads, past], [eps]))


def attention_block(
    x: mx.array,
    norm: Any,
    weights: AttentionWeights,
    q_norm: Any,
    k_norm: Any,
    cos: mx.array,
    sin: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    past: int = 0,
    mask: mx.array | None = None,
    eps: float = 1e-6,
) -> tuple[mx.array, mx.array, mx.array]:
    """(y, keys, values) of `hadamoe.ops.attention_block`; arguments as there."""
    signs, tables, ints = weights.arguments(past)
    fixed = [norm, *signs, q_norm, k_norm, *tables, *weights.buffers]
    y = Output(0, 2, (weights.hidden_size,), mx.float32)
    inputs, states = [x, cos, sin, mask, *fixed], (keys, values)
    return tuple(call("attention_block", inputs, [1, 1, 1, 1], [y], states, ints, [eps]))


def _counts(op: str, like: mx.array, mask: mx.array | None, lengths: Any) -> mx.array | None:
    """i32 ``[b]``: the tokens of each sequence that its states see; None for all."""
    if mask is not None and mask.shape != like.shape[:2]:
        raise ContractError(f"{op}: mask has shape {mask.shape}, needs {like.shape[:2]}")
    if lengths is not None:
        lengths = integers(op, "lengths", lengths)
        if lengths.shape != like.shape[:1]:
            raise ContractError(f"{op}: lengths has shape {lengths.shape}, needs {like.shape[:1]}")
        return lengths.astype(mx.int32)
    if mask is None:
        return None
    return mx.where(mask, mx.arange(1, mask.shape[1] + 1), 0).max(axis=1).astype(mx.int32)


def _array(a: Any) -> mx.array:
    return a if isinstance(a, mx.array) else mx.array(a)
