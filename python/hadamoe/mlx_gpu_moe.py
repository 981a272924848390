"""The mixture of experts on MLX's GPU, lazily."""

from __future__ import annotations

import mlx.core as mx

from . import gpu_calls
from .mlx_gpu import front
from .roles import MoeWeights


def moe_decode(x: mx.array, moe: MoeWeights, *, top_k: int, normalize: bool = True) -> mx.array:
    """`ops.moe_decode` of f32, f16 or bf16 ``[..., hidden]``."""
    y = gpu_calls.moe(front(), x.astype(mx.float32), moe, top_k=top_k, normalize=normalize)
    return y.astype(x.dtype)


def moe_block(
    x: mx.array,
    norm: mx.array,
    moe: MoeWeights,
    *,
    top_k: int,
    normalize: bool = True,
    eps: float = 1e-6,
) -> mx.array:
    """`ops.moe_block` of f32 ``[..., hidden]``."""
    return gpu_calls.moe(front(), x, moe, top_k=top_k, normalize=normalize, norm=(norm, eps))
