"""The model's layers on CUDA, each half a few launches: `gpu_calls` over weights in GPU memory.

Activations are f32 ``[n, hidden]``: the tokens of all sequences, one behind the other. Norms and
residuals are inside the products. A `Segment` says whose tokens are where, for what lies between
products and knows sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right

from . import gpu_calls
from .formats import ModelFiles, roles
from .gpu_calls import Front
from .gpu_weight import gpu_experts, gpu_weight
from .packed import PackedWeight
from .roles import AttentionWeights, DeltaWeights, MoeWeights
from .torch_cuda import front as front_of
from .torch_cuda_kv import KVStates
from .torch_gpu import gated_delta_in_place
from .torch_layers import f32
from .weight import Weight

Tensor = torch.Tensor


class Place(NamedTuple):
    """A weight that belongs in GPU memory.

    Attributes:
        weights: what it is made of. nbytes: it takes there.
        make: copies it to a front end's GPU.
    """

    weights: tuple[PackedWeight, ...]
    nbytes: int
    make: Callable[[Front], Any]


def place(*weights: PackedWeight) -> Place:
    """Weights that read the same input, side by side."""
    nbytes = gpu_weight(*weights).words.nbytes
    return Place(weights, nbytes, lambda front: gpu_calls.resident(front, *weights))


def _experts(*weights: PackedWeight) -> Place:
    """Experts and the shared one."""
    nbytes = gpu_experts(*weights)[0].words.nbytes
    return Place(weights, nbytes, lambda front: gpu_calls.experts(front, *weights))


class Segment(NamedTuple):
    """Tokens ``begin:end`` of a pass are the next ones of a sequence after ``past``."""

    sequence: int
    begin: int
    end: int
    past: int


class Pass(NamedTuple):
    """Tokens that go through the layers together.

    Attributes:
        segments: whose they are. batch: sequences there are, with those that have none.
        angles: cos, sin f32 ``[n, rotary]``.
        lengths, counts: i32 ``[b]``: tokens before, tokens of this pass.
    """

    segments: list[Segment]
    batch: int
    angles: tuple[Tensor, Tensor]
    lengths: Tensor
    counts: Tensor

    def side_by_side(self, k: Tensor, v: Tensor) -> Tensor:
        """Keys and values ``[n, g, d]`` as ``[2, b, g, t, d]``, each sequence's at the end."""
        most = max(s.end - s.begin for s in self.segments)
        both = k.new_zeros((2, self.batch, k.shape[1], most, k.shape[2]))
        for s in self.segments:
            for side, a in enumerate((k, v)):
                to = both[side, s.sequence, :, most - (s.end - s.begin) :]
                to.copy_(a[s.begin : s.end].transpose(0, 1))
        return both


class _Block(nn.Module):
    """Vectors in GPU memory, and what products need."""

    def __init__(self, eps: float, **vectors: np.ndarray) -> None:
        super().__init__()
        self.eps = eps
        for name, v in vectors.items():
            self.register_buffer(name, f32(v), persistent=False)

    def product(self, x: Tensor, *weights: PackedWeight, **options: Any) -> Tensor:
        """`gpu_calls.product` of weights side by side."""
        front = front_of(x.device)
        return gpu_calls.product(front, x, gpu_calls.resident(front, *weights), **options)


class Embedding(nn.Module):
    """Rows of a stored matrix as f32; a rotated matrix is rotated back."""

    def __init__(self, packed: PackedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed, self.num_embeddings = packed, packed.rows
        self.embedding_dim = packed.in_features
        # Empty: it carries the dtype and device that transformers reads off a model's parameters.
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    def places(self) -> list[Place]:
        """What belongs in GPU memory."""
        return [place(self.packed)]

    def forward(self, ids: Tensor) -> Tensor:
        """f32 ``[..., hidden]`` of integers ``[...]``."""
        front, r = front_of(ids.device), self.packed.rotation
        w = gpu_calls.resident(front, self.packed)
        y = gpu_calls.dequantize(front, w, ids.to(torch.int32), "float32")
        if r is not None:
            y = gpu_calls.hadamard(front, y, block=r.block, pre=r.post, post=r.pre)
        return y[..., : self.embedding_dim].contiguous()


class Head(_Block):
    """Logits f32.

    Args:
        norm: f32 [hidden], of the model's last RMSNorm, as it is used. eps: its epsilon.
    """

    def __init__(self, packed: PackedWeight, norm: np.ndarray, eps: float) -> None:
        super().__init__(eps, norm=norm)
        self.packed, self.out_features = packed, packed.rows

    def places(self) -> list[Place]:
        """What belongs in GPU memory."""
        return [place(self.packed)]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., vocabulary]`` of hidden states after the last norm."""
        flat = x.reshape(-1, x.shape[-1]).float()
        return self.product(flat, self.packed).reshape(*x.shape[:-1], self.out_features)

    def logits(self, x: Tensor) -> Tensor:
        """``[n, vocabulary]`` of hidden states f32 ``[n, hidden]`` before the last norm."""
        return self.product(x, self.packed, norm=(self.norm, self.eps))


class GatedDeltaNet(_Block):
    """Linear attention: three launches a token.

    Args:
        weights: qkv, z, b, a, out.
        norm: of the layer's input, f32, as it is used.
        vectors: conv_weight, a_log, dt_bias, norm.
    """

    def __init__(
        self, config: Any, weights: dict[str, Weight], norm: np.ndarray, vectors: dict[str, Any]
    ) -> None:
        names = ("conv_weight", "a_log", "dt_bias")
        kept = {name: vectors[name] for name in names} | {"gated_norm": vectors["norm"]}
        super().__init__(config.rms_norm_eps, norm=norm, **kept)
        self.packed = DeltaWeights.of(**weights)
        self.heads = config.linear_num_key_heads, config.linear_num_value_heads
        self.head_dims = config.linear_key_head_dim, config.linear_value_head_dim
        w = self.packed
        self.inputs = w.qkv, w.z, w.b, w.a

    def places(self) -> list[Place]:
        """What belongs in GPU memory."""
        return [place(*self.inputs), place(self.packed.out)]

    @property
    def state_bytes(self) -> int:
        """Of `states` of a sequence."""
        dk, dv = self.head_dims
        return 4 * (self.conv_weight.numel() + self.heads[1] * dk * dv)

    def states(self, batch: int) -> tuple[Tensor, Tensor]:
        """The conv window f32 ``[b, channels, taps]`` and the state ``[b, hv, dk, dv]``, zeros."""
        conv = self.conv_weight.new_zeros((batch, *self.conv_weight.shape))
        return conv, conv.new_zeros((batch, self.heads[1], *self.head_dims))

    def _between(self, proj: Tensor, conv: Tensor, state: Tensor) -> Tensor:
        """y ``[b, t, hv dv]`` of proj ``[b, t, ...]``; states are written."""
        vectors = self.conv_weight, self.a_log, self.dt_bias, self.gated_norm
        sizes = {"heads": self.heads, "head_dims": self.head_dims, "eps": self.eps}
        arrays = proj, *vectors, conv, state
        return gated_delta_in_place(front_of(proj.device), *arrays, **sizes)

    def prompt(self, x: Tensor, now: Pass, states: tuple[Tensor, Tensor]) -> Tensor:
        """``x + delta(rmsnorm(x))``; states are written."""
        proj = self.product(x, *self.inputs, norm=(self.norm, self.eps))
        ys = [
            self._between(proj[None, s.begin : s.end], *(a[s.sequence, None] for a in states))[0]
            for s in now.segments
        ]
        y = ys[0] if len(ys) == 1 else torch.cat(ys)
        return self.product(y, self.packed.out, residual=x)

    def step(self, x: Tensor, conv: Tensor, state: Tensor) -> Tensor:
        """`prompt` of one token of every sequence."""
        proj = self.product(x, *self.inputs, norm=(self.norm, self.eps))
        y = self._between(proj[:, None], conv, state)
        return self.product(y[:, 0], self.packed.out, residual=x)


class Attention(_Block):
    """Gated attention over coded pages: five launches a token.

    Args:
        weights: q, k, v, o.
        norm: of the layer's input, f32, as it is used.
        vectors: q_norm and k_norm, as they are used.
        ordinal: of the attention layers.
    """

    def __init__(
        self, config: Any, weights: dict[str, Weight], norm: np.ndarray, vectors: dict[str, Any],
        ordinal: int, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        super().__init__(config.rms_norm_eps, norm=norm, **vectors)
        self.packed, self.ordinal, self.dtype = AttentionWeights.of(**weights), ordinal, dtype
        self.heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        w = self.packed
        self.inputs = w.q, w.k, w.v

    def places(self) -> list[Place]:
        """What belongs in GPU memory."""
        return [place(*self.inputs), place(self.packed.o)]

    def prompt(self, x: Tensor, now: Pass, kv: KVStates) -> Tensor:
        """``x + attention(rmsnorm(x))``; keys and values are stored."""
        proj = self.product(x, *self.inputs, norm=(self.norm, self.eps))
        q, gate, k, v = self._by_head(proj)
        q = _turned(_normed(q, self.q_norm, self.eps), *now.angles)
        k = _turned(_normed(k, self.k_norm, self.eps), *now.angles)
        q, k, v = (a.to(self.dtype) for a in (q, k, v))
        ys = []
        for s in now.segments:
            new = [a[s.begin : s.end].transpose(0, 1) for a in (k, v)]
            if s.past:
                old = kv.past(self.ordinal, s.sequence, s.past)
                new = [torch.cat(pair, 1) for pair in zip(old, new, strict=True)]
            ys.append(_attend(q[s.begin : s.end].transpose(0, 1), *new).transpose(0, 1))
        kv.append(self.ordinal, now.side_by_side(k, v), now.lengths, now.counts)
        y = torch.cat(ys).float() * gate.sigmoid()
        return self.product(y.reshape(len(x), -1), self.packed.o, residual=x)

    def _by_head(self, proj: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, gates, keys and values ``[n, heads, d]``."""
        h, g, d = self.heads
        both, k, v = proj.split([2 * h * d, g * d, g * d], -1)
        both = both.reshape(len(proj), h, 2, d)
        return both[:, :, 0], both[:, :, 1], k.reshape(-1, g, d), v.reshape(-1, g, d)

    def step(self, x: Tensor, at: Tensor, kv: KVStates) -> Tensor:
        """`prompt` of one token of every sequence.

        at: i32 ``[2, b]``: positions, and tokens that are stored.
        """
        proj = self.product(x, *self.inputs, norm=(self.norm, self.eps))
        y = kv.attend(self.ordinal, proj, (self.q_norm, self.k_norm), self.eps, at)
        return self.product(y, self.packed.o, residual=x)


def _normed(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x, gamma.shape, gamma, eps)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the first columns of ``[n, heads, d]``."""
    rotary = cos.shape[-1]
    x, rest = x[..., :rotary], x[..., rotary:]
    a, b = x.chunk(2, -1)
    x = x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]
    return torch.cat([x, rest], -1)


def _attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention ``[heads, t, d]`` of the last t of the keys ``[kv heads, n, d]``."""
    bias = None if q.shape[1] == 1 else causal_lower_right(q.shape[1], keys.shape[1])
    arrays = [a[None] for a in (q, keys, values)]
    return torch.nn.functional.scaled_dot_product_attention(
        *arrays, attn_mask=bias, enable_gqa=True
    )[0]


class Experts(_Block):
    """Router, experts and shared expert: three launches for up to 8 tokens.

    Args:
        weights: router, gate_up, down, shared_gate_up, shared_down, shared_gate.
        top_k: experts a token is sent to.
        norm: f32 [hidden], of the RMSNorm in front, as it is used. eps: its epsilon.
    """

    def __init__(
        self, weights: dict[str, Weight], top_k: int, norm: np.ndarray, eps: float
    ) -> None:
        super().__init__(eps, norm=norm)
        self.packed, self.top_k = MoeWeights.of(**weights), top_k

    def places(self) -> list[Place]:
        """What belongs in GPU memory."""
        w = self.packed
        return [
            place(w.router, w.shared_gate),
            _experts(w.gate_up, w.shared_gate_up),
            _experts(w.down, w.shared_down),
        ]

    def forward(self, x: Tensor) -> Tensor:
        """``x + moe(rmsnorm(x))`` of f32 ``[n, hidden]``."""
        norm = self.norm, self.eps
        moe = partial(gpu_calls.moe, front_of(x.device), x, self.packed)
        return moe(top_k=self.top_k, normalize=True, norm=norm)


class Layer(nn.Module):
    """A mixer, `GatedDeltaNet` or `Attention`, then a mixture of experts."""

    def __init__(self, mixer: GatedDeltaNet | Attention, mlp: Experts) -> None:
        super().__init__()
        self.linear = isinstance(mixer, GatedDeltaNet)
        self.mixer, self.mlp = mixer, mlp

    def places(self) -> list[Place]:
        """What belongs in GPU memory."""
        return [*self.mixer.places(), *self.mlp.places()]


def layers(files: ModelFiles, config: Any, dtype: torch.dtype) -> nn.ModuleList:
    """All layers of a checkpoint."""
    made, ordinal = [], 0
    for i, kind in enumerate(config.layer_types):
        norms = roles.norms(files, i)
        if kind == "full_attention":
            mixer = Attention(config, *_split(roles.attention(files, i), norms[0]), ordinal, dtype)
            ordinal += 1
        else:
            mixer = GatedDeltaNet(config, *_split(roles.delta_net(files, i), norms[0]))
        top_k, eps = config.num_experts_per_tok, config.rms_norm_eps
        made.append(Layer(mixer, Experts(roles.moe(files, i), top_k, norms[1], eps)))
    return nn.ModuleList(made)


def _split(found: tuple[dict, dict], norm: np.ndarray) -> tuple[dict, np.ndarray, dict]:
    weights, vectors = found
    return weights, norm, vectors
