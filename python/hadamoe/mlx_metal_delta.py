"""The Gated DeltaNet on MLX's Metal device: functions of `hadamoe.mlx`, lazily, states returned."""

from __future__ import annotations

import mlx.core as mx

from . import metal_delta
from .mlx_metal import dtype_name, product, resident, run
from .roles import DeltaWeights


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
    eps: float = 1e-6,
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """(y, conv_state, state) after the tokens of ``proj``; arguments as in `ops.gated_delta`.

    Args:
        mask: bool ``[b, t]``: False makes a token's projections 0; None for none.
        lengths: i32 ``[b]``: tokens behind leave the states as they are, their y is 0.
    """
    b, t, _ = proj.shape
    launch = metal_delta.gated_delta(
        b,
        t,
        heads,
        head_dims,
        conv_weight.shape[-1],
        dtype_name(proj),
        eps=eps,
        mask=mask is not None,
        lengths=lengths is not None,
    )
    arrays = {
        "proj": proj,
        "conv_weight": conv_weight,
        "a_log": a_log,
        "dt_bias": dt_bias,
        "norm": norm,
        "conv_state": conv_state,
        "state": state,
        "mask": mask,
        "lengths": lengths,
        "dims": mx.array([t], mx.int32),
    }
    return tuple(run(launch, arrays))


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
