"""The model's layers as MLX modules, to stand in mlx-lm's qwen3_5_moe in place of its own.

The residual stream, routers, gates and recurrent states are f32; dtype is what the cache of
attention uses. Each half of a layer has its norm and its residual inside.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.rope_utils import initialize_rope

from . import mlx_gpu, mlx_gpu_kv, ops
from .mlx import gated_delta_block
from .mlx_layers import QLinear
from .roles import DeltaWeights, MoeWeights
from .weight import Weight

__all__ = ["Attention", "DecoderLayer", "GatedDeltaNet", "SparseMoeBlock"]


class GatedDeltaNet(nn.Module):
    """Linear attention.

    Its conv window f32 ``[batch, channels, kernel]`` and state f32 ``[batch, heads, dk, dv]`` are
    entries 0 and 1 of mlx-lm's ``ArraysCache``; each call puts new arrays there.

    Args:
        args: mlx-lm's ``TextModelArgs``.
        weights: qkv, z, b, a, out.
        norm: f32 [hidden], of the layer's input, as it is used.
        vectors: f32 conv_weight, a_log, dt_bias, norm.
    """

    def __init__(
        self, args: Any, weights: dict[str, Weight], norm: np.ndarray, vectors: dict[str, Any]
    ) -> None:
        super().__init__()
        self.args, self.packed = args, DeltaWeights.of(**weights)
        self._norm = mx.array(norm)
        self._conv_weight, self._a_log, self._dt_bias, self._gated_norm = (
            mx.array(vectors[name]) for name in ("conv_weight", "a_log", "dt_bias", "norm")
        )

    def states(self, batch: int, cache: Any) -> tuple[mx.array, mx.array]:
        """The conv window and the state of a cache; zeros where it has none."""
        if cache is not None and cache[0] is not None:
            return cache[0], cache[1]
        a = self.args
        dims = a.linear_num_value_heads, a.linear_key_head_dim, a.linear_value_head_dim
        return mx.zeros((batch, *self._conv_weight.shape)), mx.zeros((batch, *dims))

    def __call__(self, x: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:
        """``x + delta(rmsnorm(x))`` of f32 ``[batch, tokens, hidden]``.

        mask: bool ``[batch, tokens]``: False is padding, before or behind a sequence's tokens.
        """
        a = self.args
        vectors = self._conv_weight, self._a_log, self._dt_bias, self._gated_norm
        y, *states = gated_delta_block(
            x, self._norm, self.packed, *vectors, *self.states(x.shape[0], cache), mask=mask,
            heads=(a.linear_num_key_heads, a.linear_num_value_heads),
            head_dims=(a.linear_key_head_dim, a.linear_value_head_dim), eps=a.rms_norm_eps,
        )  # fmt: skip
        if cache is not None:
            cache[0], cache[1] = states
            cache.advance(x.shape[1])
        return y


class Attention(nn.Module):
    """Gated attention over any cache of mlx-lm; keys and values are kept in dtype.

    Args:
        args: mlx-lm's ``TextModelArgs``.
        weights: q, k, v, o.
        norm: f32 [hidden], of the layer's input, as it is used.
        vectors: f32 q_norm and k_norm, as they are used.
    """

    def __init__(
        self, args: Any, weights: dict[str, Weight], norm: np.ndarray, vectors: dict[str, Any],
        dtype: mx.Dtype,
    ) -> None:  # fmt: skip
        super().__init__()
        q, k, v, o = (weights[name] for name in "qkvo")
        self.qkv_proj, self.o_proj = QLinear(q, k, v), QLinear(o)
        self.args, self.head_dim, self.ends = args, args.head_dim, np.cumsum([q.rows, k.rows])
        self.eps, self.scale, self.dtype = args.rms_norm_eps, args.head_dim**-0.5, dtype
        self._norm = mx.array(norm)
        self._q_norm, self._k_norm = (mx.array(vectors[name]) for name in ("q_norm", "k_norm"))
        self.rope = initialize_rope(
            int(args.head_dim * args.partial_rotary_factor), base=args.rope_theta,
            traditional=False, scaling_config=args.rope_scaling,
            max_position_embeddings=args.max_position_embeddings,
        )  # fmt: skip
        self._freqs, self.stretch = _turning(self.rope)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """``x + attention(rmsnorm(x))`` of f32 ``[batch, tokens, hidden]``.

        mask: as mlx-lm makes it: None, "causal" or bool that broadcasts to
        ``[batch, heads, tokens, keys]``.
        """
        proj = self.qkv_proj(x, (self._norm, self.eps))
        attend = self._on_gpu if mlx_gpu.available() else self._in_parts
        y = attend(proj, mask, cache, 0 if cache is None else cache.offset)
        return self.o_proj(y, residual=x)

    def _in_parts(self, proj: mx.array, mask: Any, cache: Any, offset: Any) -> mx.array:
        """f32 ``[b, t, heads * d]`` of the projection ``[b, t, (2 heads + 2 kv_heads) d]``."""
        q, k, v = mx.split(proj, self.ends.tolist(), -1)
        q = self._by_head(q)[:, :, ::2]  # per head its query, then its gate
        q, k = (
            self.rope(mx.fast.rms_norm(a, norm, self.eps).transpose(0, 2, 1, 3), offset=offset)
            for a, norm in ((q, self._q_norm), (self._by_head(k), self._k_norm))
        )
        k, v = (a.astype(self.dtype) for a in (k, self._by_head(v).transpose(0, 2, 1, 3)))
        return self._seen(q, k, v, proj, mask, cache)

    def _on_gpu(self, proj: mx.array, mask: Any, cache: Any, offset: Any) -> mx.array:
        """As `_in_parts`, with one launch for norms and positions; a token over coded pages reads
        the codes."""
        coded = proj.shape[1] == 1 and getattr(cache, "attends", False)
        # f32 queries would have the GPU copy a whole plain cache to f32
        dtypes = {"q_dtype": mx.float32 if coded else self.dtype, "kv_dtype": self.dtype}
        heads = self.args.num_attention_heads, self.args.num_key_value_heads
        tokens = mlx_gpu_kv.prepare(
            proj, heads, self.head_dim, (self._q_norm, self._k_norm), self._freqs, offset,
            eps=self.eps, stretch=self.stretch, form=cache.format if coded else None, **dtypes,
        )  # fmt: skip
        if coded:
            return cache.attend(tokens, proj)
        return self._seen(tokens.q, *tokens.kv, proj, mask, cache)

    def _seen(
        self, q: mx.array, k: mx.array, v: mx.array, proj: mx.array, mask: Any, cache: Any
    ) -> mx.array:
        """Attention of ``[b, heads, t, d]`` over what the cache has and k, v, times the gates."""
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        y = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)
        gate = self._by_head(proj[..., : self.ends[0]])[:, :, 1::2]
        y = y.astype(mx.float32).transpose(0, 2, 1, 3) * mx.sigmoid(gate)
        return y.reshape(*proj.shape[:2], -1)

    def _by_head(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:2], -1, self.head_dim)


def _turning(rope: nn.Module) -> tuple[mx.array, float]:
    """Radians a position, f32 ``[rotary / 2]``, and YaRN's factor of cosines and sines."""
    if isinstance(rope, nn.RoPE):
        freqs = rope.base ** (-np.arange(0, rope.dims, 2) / rope.dims)
        return mx.array(freqs.astype(np.float32)), 1.0
    return 1 / rope._freqs, rope.mscale


class SparseMoeBlock(nn.Module):
    """Router, experts and shared expert: one call for any number of tokens.

    Args:
        args: mlx-lm's ``TextModelArgs``.
        weights: router, gate_up, down, shared_gate_up, shared_down, shared_gate.
        norm: f32 [hidden], of the RMSNorm in front, as it is used.
    """

    def __init__(self, args: Any, weights: dict[str, Weight], norm: np.ndarray) -> None:
        super().__init__()
        self.packed = MoeWeights.of(**weights)
        self.top_k, self.eps = args.num_experts_per_tok, args.rms_norm_eps
        self._norm = mx.array(norm)

    def __call__(self, x: mx.array) -> mx.array:
        """``x + moe(rmsnorm(x))`` of f32 ``[..., hidden]``."""
        return ops.moe_block(x, self._norm, self.packed, top_k=self.top_k, eps=self.eps)


class DecoderLayer(nn.Module):
    """mlx-lm's layer: a mixer, `GatedDeltaNet` or `Attention`, then a mixture of experts."""

    def __init__(self, mixer: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.is_linear = isinstance(mixer, GatedDeltaNet)
        setattr(self, "linear_attn" if self.is_linear else "self_attn", mixer)
        self.mlp = mlp

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """f32 ``[batch, tokens, hidden]`` to the same."""
        mixer = self.linear_attn if self.is_linear else self.self_attn
        return self.mlp(mixer(x, mask, cache))
