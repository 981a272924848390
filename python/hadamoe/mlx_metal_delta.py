"""The Gated DeltaNet on MLX's Metal device: functions of `hadamoe.mlx`, lazily, states returned."""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from . import metal_calls
from .mlx_metal import FRONT, product, resident
from .roles import DeltaWeights

gated_delta = partial(metal_calls.gated_delta, FRONT)


def gated_delta_block(
    x: mx.array,
    norm: mx.array,
    weights: DeltaWeights,
    *vectors: mx.array,
    heads: tuple[int, int],
    head_dims: tuple[int, int],
    eps: float = 1e-6,
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """(y, conv_state, state); arguments as in `ops.gated_delta_block`: three launches a token.

    Args:
        vectors: conv_weight, a_log, dt_bias, gated_norm, conv_state, state.
    """
    *lead, width = x.shape
    flat = x.reshape(-1, width)
    w = weights
    proj = product(flat, resident(w.qkv, w.z, w.b, w.a), norm=(norm, eps))
    y, conv_state, state = gated_delta(
        proj.reshape(*lead, -1),
        *vectors,
        heads=heads,
        head_dims=head_dims,
        eps=eps,
        mask=mask,
        lengths=lengths,
    )
    out = product(y.reshape(len(flat), -1), resident(w.out), residual=flat)
    return out.reshape(x.shape), conv_state, state
