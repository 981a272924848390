"""The model's layers as torch modules over the ops.

Weights are buffers that alias the memory-mapped files: building a layer reads none of their bytes.
The residual stream, routers, gates and recurrent states are f32 whatever the dtype: they are
few bytes beside the weights, and rounding them is what costs accuracy. dtype is what attention and
its cache use, and the vision tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as hf

from .errors import UnsupportedError
from .ops import MoeWeights, PackedWeight, pack
from .torch_ops import as_tensor, operators
from .weight import Rotation, Weight, fuse_rows

Tensor = torch.Tensor


def f32(array: np.ndarray) -> Tensor:
    """A copy as an f32 tensor."""
    return torch.from_numpy(np.array(array, np.float32))


class _Stored(nn.Module):
    """Owns the part tables and the mapped buffers of the matrices one op call reads."""

    def store(self, **weights: PackedWeight) -> None:
        """Registers the part tables by name, and the buffers all of them share."""
        for name, w in weights.items():
            self.register_buffer(name, as_tensor(w.parts), persistent=False)
        shared = next(iter(weights.values())).buffers
        for i, buffer in enumerate(shared):
            self.register_buffer(f"buffer{i}", as_tensor(buffer), persistent=False)
        self.n_buffers = len(shared)

    def keep(self, **vectors: np.ndarray | None) -> None:
        """Registers small f32 vectors (signs, norms, decays)."""
        for name, v in vectors.items():
            self.register_buffer(name, None if v is None else f32(v), persistent=False)

    @property
    def buffers_(self) -> list[Tensor]:
        return [getattr(self, f"buffer{i}") for i in range(self.n_buffers)]


class _Fused(_Stored):
    """Matrices of one input under one rotation: at most one hadamard, then one qmatmul."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.rows, r = weight.rows, weight.rotation
        self.store(parts=pack(weight))
        self.block = None if r is None else r.block or 0
        self.keep(pre=r and r.pre, post=r and r.post)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self.block is not None:
            x = operators.hadamard(x, self.pre, self.post, self.block, torch.float32)
        return operators.qmatmul(x, self.parts, None, self.buffers_, self.rows, dtype)


class QLinear(nn.Module):
    """y = x W^T (+ bias) for stored matrices that share an input; results side by side, in order.

    Args:
        weights: one matrix, or several of equal in_features; fused, one call per distinct rotation.
        bias: [rows] or None.
        dtype: of the result; None for the input's.
    """

    def __init__(
        self,
        *weights: Weight,
        bias: np.ndarray | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        groups: dict[Rotation | None, list[int]] = {}
        for i, w in enumerate(weights):
            groups.setdefault(w.rotation, []).append(i)
        self.fused = nn.ModuleList(
            _Fused(fuse_rows([weights[i] for i in g])) for g in groups.values()
        )
        self.sizes = [[weights[i].rows for i in g] for g in groups.values()]
        order = [i for g in groups.values() for i in g]
        self.order = None if len(groups) == 1 else [order.index(i) for i in range(len(weights))]
        self.in_features, self.out_features = weights[0].in_features, sum(w.rows for w in weights)
        self.dtype = dtype
        self.register_buffer("bias", None if bias is None else f32(bias), persistent=False)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype or x.dtype
        if self.order is None:
            y = self.fused[0](x, dtype)
        else:
            ys = [
                y
                for f, n in zip(self.fused, self.sizes, strict=True)
                for y in f(x, dtype).split(n, -1)
            ]
            y = torch.cat([ys[i] for i in self.order], -1)
        return y if self.bias is None else (y + self.bias).to(dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class QEmbedding(_Stored):
    """Rows of a stored matrix as f32, decoded when asked for; a rotated matrix is rotated back."""

    def __init__(self, weight: Weight, dtype: torch.dtype) -> None:
        super().__init__()
        self.columns, self.embedding_dim, r = weight.columns, weight.in_features, weight.rotation
        self.num_embeddings = weight.rows
        self.store(parts=pack(weight))
        self.block = None if r is None else r.block or 0
        self.keep(pre=r and r.pre, post=r and r.post)
        # Empty: it carries the dtype and device that transformers reads off a model's parameters.
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        y = operators.dequantize(self.parts, ids.long(), self.buffers_, self.columns, torch.float32)
        if self.block is not None:
            y = operators.hadamard(y, self.post, self.pre, self.block, torch.float32)
        return y[..., : self.embedding_dim].contiguous()


class _Router(hf.Qwen3_5MoeTopKRouter):
    """Router logits on their own, for ``output_router_logits``; the block's op routes by itself."""

    def __init__(self, weight: Weight, top_k: int) -> None:
        nn.Module.__init__(self)
        self.linear, self.top_k = QLinear(weight, dtype=torch.float32), top_k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.linear(x.reshape(-1, x.shape[-1]))
        scores, index = torch.topk(logits.softmax(-1), self.top_k, dim=-1)
        return logits, scores / scores.sum(-1, keepdim=True), index


class SparseMoeBlock(_Stored):
    """Router, experts and shared expert: one moe_decode call for any number of tokens.

    Args:
        weights: router, gate_up, down, shared_gate_up, shared_down, shared_gate.
        top_k: experts a token is sent to.
    """

    def __init__(self, weights: dict[str, Weight], top_k: int) -> None:
        super().__init__()
        moe = MoeWeights.of(**weights)
        self.names = tuple(MoeWeights.__dataclass_fields__)
        self.store(**dict(zip(self.names, moe.roles, strict=True)))
        signs, _, self.ints = moe.arguments(top_k, normalize=True)
        self.signs = ("hidden_pre", "hidden_post", "inner_pre", "inner_post")
        self.keep(**dict(zip(self.signs, signs, strict=True)))
        self.gate = _Router(weights["router"], top_k)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate._forward_hooks:  # someone records router logits
            self.gate(x)
        arrays = (getattr(self, name) for name in (*self.signs, *self.names))
        return operators.moe_decode(x, *arrays, self.buffers_, *self.ints)[0]


class _Columns(nn.Module):
    """Columns begin:end of an input that is already projected."""

    def __init__(self, begin: int, end: int) -> None:
        super().__init__()
        self.begin, self.end = begin, end

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.begin : self.end]


class Attention(hf.Qwen3_5MoeAttention):
    """transformers' gated attention over one fused q|k|v projection; q, k, v and cache in dtype."""

    def __init__(
        self, config, layer: int, q: Weight, k: Weight, v: Weight, o: Weight, dtype: torch.dtype
    ) -> None:
        with torch.device("meta"):
            super().__init__(config, layer)
        self.qkv_proj, self.o_proj, self.out = QLinear(q, k, v), nn.Identity(), QLinear(o)
        self.dtype = dtype
        ends = np.cumsum([0, q.rows, k.rows, v.rows]).tolist()
        self.q_proj, self.k_proj, self.v_proj = (_Columns(a, b) for a, b in pairwise(ends))

    def forward(self, hidden_states: Tensor, position_embeddings, *args, **kwargs):
        qkv = self.qkv_proj(hidden_states, self.dtype)
        angles = tuple(a.to(self.dtype) for a in position_embeddings)
        y, weights = super().forward(qkv, angles, *args, **kwargs)
        return self.out(y, hidden_states.dtype), weights


class GatedDeltaNet(_Stored):
    """Linear attention: one fused qkv|z|b|a projection, one gated_delta call, out_proj.

    The conv window f32 [batch, channels, kernel] and the state f32 [batch, heads, dk, dv] live in
    transformers' cache layer and are updated in place, so generate(), beam reordering and continued
    generation work as for its own layer.
    """

    def __init__(
        self, config, layer: int, projections: Sequence[Weight], out: Weight, vectors
    ) -> None:
        super().__init__()
        self.layer = layer
        self.heads = (
            config.linear_num_key_heads,
            config.linear_num_value_heads,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
        )
        self.eps = config.rms_norm_eps
        self.in_proj, self.out_proj = QLinear(*projections, dtype=torch.float32), QLinear(out)
        self.keep(**vectors)

    def _states(self, cache, batch: int) -> tuple[Tensor, Tensor]:
        _, hv, dk, dv = self.heads
        entry = None if cache is None else cache.layers[self.layer]
        if entry is None or not entry.is_recurrent_states_initialized[0]:
            conv = self.conv_weight.new_zeros((batch, *self.conv_weight.shape))
            state = conv.new_zeros((batch, hv, dk, dv))
            if entry is None:
                return conv, state
            entry.lazy_initialization(conv_states=conv)
            entry.lazy_initialization(recurrent_states=state)
        if entry.record_past:
            raise UnsupportedError(
                "gated_delta: the cache records past states, needs a plain cache"
            )
        entry.has_previous_state[0] = True
        return entry.conv_states[0], entry.recurrent_states[0]

    def forward(self, hidden_states: Tensor, cache_params=None, attention_mask=None, **_) -> Tensor:
        x = hf.apply_mask_to_padding_states(hidden_states, attention_mask)
        conv, state = self._states(cache_params, x.shape[0])
        y = operators.gated_delta(
            self.in_proj(x), self.conv_weight, self.a_log, self.dt_bias, self.norm, conv, state,
            *self.heads, self.eps, torch.float32,
        )  # fmt: skip
        return self.out_proj(y, hidden_states.dtype)
