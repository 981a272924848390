"""The Gated DeltaNet on MLX's GPU: functions of `hadamoe.mlx`, lazily, states returned."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from . import gpu_calls
from .mlx_gpu import front, product, resident
from .roles import DeltaWeights


def gated_delta(*arrays: Any, **options: Any) -> list[mx.array]:
    """`gpu_calls.gated_delta`."""
    return gpu_calls.gated_delta(front(), *arrays, **options)


def gated_delta_block(
    x: mx.array,
    norm: mx.array,
    weights: DeltaWeights,
    *vectors: mx.array,
    eps: float = 1e-6,
    **options: Any,
) -> tuple[mx.array, mx.array, mx.array]:
    """(y, conv_state, state); arguments as in `ops.gated_delta_block`: three launches a token.

    Args:
        vectors: conv_weight, a_log, dt_bias, gated_norm, conv_state, state.
        options: of `gpu_calls.gated_delta`.
    """
    *lead, width = x.shape
    flat = x.reshape(-1, width)
    w = weights
    proj = product(flat, resident(w.qkv, w.z, w.b, w.a), norm=(norm, eps))
    proj = proj.reshape(*lead, -1)
    y, conv_state, state = gated_delta(proj, *vectors, eps=eps, **options)
    out = product(y.reshape(len(flat), -1), resident(w.out), residual=flat)
    return out.reshape(x.shape), conv_state, state
