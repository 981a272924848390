"""The model's layers as torch modules.

The residual stream, routers, gates and recurrent states are f32 whatever the dtype: they are
few bytes beside the weights, and rounding them is what costs accuracy. dtype is what the cache of
attention uses, and the vision tower.

Each half of a layer is one native call (`block`), its weights checked once. The same half exists in
parts, as transformers computes it, for torch.compile and for whoever listens to a part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as hf

from . import _cpu
from .errors import UnsupportedError
from .kv_ops import KVLayer
from .roles import AttentionWeights, DeltaWeights, MoeWeights
from .torch_cache import claim
from .torch_kv import KVChoice, PagedLayer, PagedStates, paged
from .torch_layers import QLinear, Stored, f32
from .torch_operators import operators
from .weight import Weight

Tensor = torch.Tensor


class _Router(hf.Qwen3_5MoeTopKRouter):
    """Router logits on their own, for ``output_router_logits``; the block's op routes by itself."""

    def __init__(self, weight: Weight, top_k: int) -> None:
        nn.Module.__init__(self)
        self.linear, self.top_k = QLinear(weight, dtype=torch.float32), top_k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.linear(x.reshape(-1, x.shape[-1]))
        scores, index = torch.topk(logits.softmax(-1), self.top_k, dim=-1)
        return logits, scores / scores.sum(-1, keepdim=True), index


class SparseMoeBlock(Stored):
    """Router, experts and shared expert: one native call for any number of tokens.

    Args:
        weights: router, gate_up, down, shared_gate_up, shared_down, shared_gate.
        top_k: experts a token is sent to.
        norm: f32 [hidden], of the RMSNorm in front, as it is used. eps: its epsilon.
    """

    def __init__(
        self, weights: dict[str, Weight], top_k: int, norm: np.ndarray, eps: float
    ) -> None:
        super().__init__()
        moe = MoeWeights.of(**weights)
        self.names = tuple(weights)
        self.store(**{name: getattr(moe, name) for name in self.names})
        signs, tables, self.ints = moe.arguments(top_k, True)
        self.signs = ("hidden_pre", "hidden_post", "inner_pre", "inner_post")
        self.keep(**dict(zip(self.signs, signs, strict=True)))
        self.gate = _Router(weights["router"], top_k)
        inputs = [..., norm, *signs, *tables, *moe.buffers]
        self.bound = _cpu.Bound("moe_block", inputs, 1, self.ints, [eps])

    def block(self, x: Tensor, y: Tensor) -> None:
        """y = x + moe(rmsnorm(x)), f32 [batch, tokens, hidden]; y may be x."""
        width = x.shape[-1]
        self.bound([x.view(-1, width)], [y.view(-1, width)], [])

    def forward(self, x: Tensor) -> Tensor:
        if self.gate._forward_hooks:  # someone records router logits
            self.gate(x)
        arrays = (getattr(self, name) for name in (*self.signs, *MoeWeights.__dataclass_fields__))
        return operators.moe_decode(x, *arrays, self.buffers_, *self.ints)[0]


class _Columns(nn.Module):
    """Columns begin:end of an input that is already projected."""

    def __init__(self, begin: int, end: int) -> None:
        super().__init__()
        self.begin, self.end = begin, end

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.begin : self.end]


class Attention(hf.Qwen3_5MoeAttention):
    """Gated attention; keys and values are kept in dtype.

    Args:
        weights: q, k, v, o.
        norms: norm (of the layer's input), q_norm and k_norm, f32, as they are used.

    Attributes:
        kv_choice: how new caches keep keys and values; None: contiguous, unquantized.
    """

    kv_choice: KVChoice | None = None

    def __init__(
        self,
        config,
        layer: int,
        weights: dict[str, Weight],
        norms: dict[str, np.ndarray],
        dtype: torch.dtype,
    ) -> None:
        with torch.device("meta"):
            super().__init__(config, layer)
        q, k, v, o = (weights[name] for name in "qkvo")
        self.qkv_proj, self.o_proj, self.out = QLinear(q, k, v), nn.Identity(), QLinear(o)
        self.dtype = dtype
        ends = np.cumsum([0, q.rows, k.rows, v.rows]).tolist()
        self.q_proj, self.k_proj, self.v_proj = (_Columns(a, b) for a, b in pairwise(ends))
        for name in ("q_norm", "k_norm"):
            getattr(self, name).weight = zero_centred(norms[name])
        self.heads = k.rows // self.head_dim, self.head_dim
        packed = AttentionWeights.of(q=q, k=k, v=v, o=o)
        signs, tables, ints = packed.arguments()
        vectors = [norms["norm"], *signs, norms["q_norm"], norms["k_norm"]]
        self.fixed = [*vectors, *tables, *packed.buffers], ints, [config.rms_norm_eps]
        inputs, ints, eps = self.fixed
        self.bound = _cpu.Bound("attention_block", [*[...] * 4, *inputs], 3, [..., *ints], eps)

    @cached_property
    def bound_to_pages(self) -> _cpu.Bound:
        """The block over a paged cache."""
        inputs, ints, eps = self.fixed
        return _cpu.Bound("kv_attention_block", [*[...] * 10, *inputs], 5, [*[...] * 3, *ints], eps)

    def claim(self, cache, batch: int, tokens: int) -> tuple[Tensor, Tensor, int] | None:
        """(keys, values, past) of the cache, None where native code cannot write into it."""
        return claim(cache, self.layer_idx, (batch, *self.heads), tokens, self.dtype)

    def new_states(self, batch: int, capacity: int) -> tuple[Tensor, Tensor]:
        """Empty keys and values [batch, heads, capacity, d]."""
        heads, d = self.heads
        shape = (batch, heads, capacity, d)
        return torch.empty(shape, dtype=self.dtype), torch.empty(shape, dtype=self.dtype)

    def block(self, x: Tensor, y: Tensor, angles, mask: Tensor | None, states, past: int) -> None:
        """y = x + attention(rmsnorm(x)), f32 [batch, tokens, hidden]; y may be x.

        Args:
            angles: cos, sin f32 [batch, tokens, rotary].
            mask: bool [batch, tokens, keys] or None for causal.
            states: keys and values; written from ``past`` on.
        """
        self.bound([x, *angles, mask], [y, *states], [past])

    def paged_block(
        self, x: Tensor, y: Tensor, angles, pages: KVLayer, lengths: np.ndarray, counts: np.ndarray
    ) -> None:
        """`block` over a paged cache; lengths and counts as `kv_ops.kv_attend` takes them."""
        inputs = [x, *angles, lengths, counts, *pages.inputs]
        self.bound_to_pages(inputs, [y, *pages.outputs], pages.ints)

    def forward(self, hidden_states: Tensor, position_embeddings, *args, **kwargs):
        qkv = self.qkv_proj(hidden_states, self.dtype)
        angles = tuple(a.to(self.dtype) for a in position_embeddings)
        y, weights = super().forward(qkv, angles, *args, **kwargs)
        return self.out(y, hidden_states.dtype), weights


class GatedDeltaNet(Stored):
    """Linear attention.

    The conv window f32 [batch, channels, kernel] and the state f32 [batch, heads, dk, dv] live in
    transformers' cache layer and are updated in place, so generate(), beam reordering and continued
    generation work as for its own layer.

    Args:
        weights: qkv, z, b, a, out.
        norm: of the layer's input, f32, as it is used.
        vectors: conv_weight, a_log, dt_bias, norm.
    """

    def __init__(
        self,
        config,
        layer: int,
        weights: dict[str, Weight],
        norm: np.ndarray,
        vectors: dict[str, np.ndarray],
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
        projections = (weights[name] for name in ("qkv", "z", "b", "a"))
        self.in_proj, self.out_proj = (
            QLinear(*projections, dtype=torch.float32),
            QLinear(weights["out"]),
        )
        self.keep(**vectors)
        packed = DeltaWeights.of(**weights)
        signs, tables, ints = packed.arguments(*self.heads)
        inputs = [..., ..., norm, *signs, *vectors.values(), *tables, *packed.buffers]
        self.bound = _cpu.Bound("gated_delta_block", inputs, 3, ints, [self.eps])

    def states(self, cache, batch: int) -> tuple[Tensor, Tensor]:
        """The conv window and the state of a transformers cache; of no cache, new ones."""
        entry = None if cache is None else cache.layers[self.layer]
        if entry is None or not entry.is_recurrent_states_initialized[0]:
            conv, state = self.new_states(batch)
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

    def new_states(self, batch: int, capacity: int = 0) -> tuple[Tensor, Tensor]:
        """A conv window and a state of zeros."""
        _, hv, dk, dv = self.heads
        conv = self.conv_weight.new_zeros((batch, *self.conv_weight.shape))
        return conv, conv.new_zeros((batch, hv, dk, dv))

    def block(self, x: Tensor, y: Tensor, mask: Tensor | None, states) -> None:
        """y = x + delta(rmsnorm(x)), f32 [batch, tokens, hidden]; y may be x. mask: bool
        [batch, tokens] or None."""
        self.bound([x, mask], [y, *states], [])

    def forward(self, hidden_states: Tensor, cache_params=None, attention_mask=None, **_) -> Tensor:
        x = hf.apply_mask_to_padding_states(hidden_states, attention_mask)
        conv, state = self.states(cache_params, x.shape[0])
        y = operators.gated_delta(
            self.in_proj(x), self.conv_weight, self.a_log, self.dt_bias, self.norm, conv, state,
            *self.heads, self.eps, torch.float32,
        )  # fmt: skip
        return self.out_proj(y, hidden_states.dtype)


def zero_centred(gamma: np.ndarray) -> nn.Parameter:
    """A norm's vector for transformers' module, which multiplies by 1 + weight in f32."""
    return nn.Parameter(f32(gamma - np.float32(1)), requires_grad=False)


class DecoderLayer(hf.Qwen3_5MoeDecoderLayer):
    """transformers' layer; its two halves are one native call each."""

    def __init__(
        self, config, layer: int, mixer: nn.Module, mlp: nn.Module, norms: Sequence[np.ndarray]
    ) -> None:
        nn.Module.__init__(self)
        self.hidden_size, self.block_type = config.hidden_size, config.layer_types[layer]
        self.config = config
        self.linear = self.block_type == "linear_attention"
        setattr(self, "linear_attn" if self.linear else "self_attn", mixer)
        self.mlp = mlp
        for name, gamma in zip(("input_layernorm", "post_attention_layernorm"), norms, strict=True):
            with torch.device("meta"):
                module = hf.Qwen3_5MoeRMSNorm(len(gamma), config.rms_norm_eps)
            module.weight = zero_centred(gamma)
            setattr(self, name, module)
        self.parts = list(self.modules())[1:]

    @property
    def mixer(self) -> nn.Module:
        """The layer's first half: GatedDeltaNet or Attention."""
        return self.linear_attn if self.linear else self.self_attn

    def in_parts(self, device: str = "cpu") -> bool:
        """On a GPU, under torch.compile, for attention other than sdpa, and where a part has hooks
        of its own; transformers' recorders of outputs are no reason."""
        if device != "cpu" or torch.compiler.is_compiling():
            return True
        if self.config._attn_implementation != "sdpa":
            return True
        return any(
            part._forward_pre_hooks
            or (
                part._forward_hooks
                and any(h.__module__ != _RECORDERS for h in part._forward_hooks.values())
            )
            for part in self.parts
        )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        **kwargs,
    ) -> Tensor:
        x, pages = None, None
        if not self.linear:
            attention = self.self_attn
            pages = paged(past_key_values, attention.layer_idx, attention.kv_choice)
            if pages is not None:
                pages.shared.mask = attention_mask
        if hidden_states.dtype == torch.float32 and not self.in_parts(hidden_states.device.type):
            x = self._mixed(
                hidden_states.contiguous(), position_embeddings, attention_mask, past_key_values,
                pages,
            )  # fmt: skip
        if x is None:
            return super().forward(
                hidden_states, position_embeddings, attention_mask, position_ids, past_key_values,
                **kwargs,
            )  # fmt: skip
        if self.mlp.gate._forward_hooks:
            self.mlp.gate(self.post_attention_layernorm(x))
        self.mlp.block(x, x)
        return x

    def _mixed(
        self, x: Tensor, angles, mask: Tensor | None, cache, pages: PagedLayer | None
    ) -> Tensor | None:
        """The first half's result; None where the cache is not one native code writes into."""
        batch, tokens, _ = x.shape
        y = torch.empty_like(x)
        if self.linear:
            mask = None if mask is None else mask.to(torch.bool).contiguous()
            self.linear_attn.block(x, y, mask, self.linear_attn.states(cache, batch))
            return y
        if pages is not None:
            pages.attend(self.self_attn, x, y, angles, mask)
            return y
        claimed = self.self_attn.claim(cache, batch, tokens)
        if claimed is None:
            return None
        if mask is not None:
            mask = mask[:, 0].expand(batch, -1, -1).contiguous()
        self.self_attn.block(x, y, angles, mask, claimed[:2], claimed[2])
        return y

    def advance(
        self, x: Tensor, angles, states: tuple[Tensor, Tensor] | PagedStates, past: int
    ) -> None:
        """The whole layer on f32 x [1, tokens, hidden], in place; states as `new_states` makes
        them, or pages with room reserved."""
        if self.linear:
            self.linear_attn.block(x, x, None, states)
        elif isinstance(states, PagedStates):
            cache = states.cache
            pages = cache.layer(states.ordinal)
            self.self_attn.paged_block(x, x, angles, pages, cache.lengths, cache.reserved)
        else:
            self.self_attn.block(x, x, angles, None, states, past)
        self.mlp.block(x, x)


#: where the hooks of output_hidden_states and its kin come from
_RECORDERS = "transformers.utils.output_capturing"
