"""Stored matrices as torch modules: linear layers and the embedding.

Weights are buffers that alias the memory-mapped files: building a layer reads none of their bytes.
The residual stream, routers, gates and recurrent states are f32 whatever the dtype: they are
few bytes beside the weights, and rounding them is what costs accuracy. dtype is what the cache of
attention uses, and the vision tower.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from . import _cpu
from .packed import PackedWeight, pack
from .torch_operators import operators
from .torch_ops import as_tensor
from .weight import Rotation, Weight, fuse_rows

Tensor = torch.Tensor


def f32(array: np.ndarray) -> Tensor:
    """A copy as an f32 tensor."""
    return torch.from_numpy(np.array(array, np.float32))


class Stored(nn.Module):
    """Owns the part tables and the mapped buffers of the matrices one op call reads."""

    def store(self, **weights: PackedWeight) -> None:
        """Keeps the part tables by name, and the buffers all of them share. They are no buffers of
        the module: whole files must not follow it to another device."""
        for name, w in weights.items():
            setattr(self, name, as_tensor(w.parts))
        self.buffers_ = [as_tensor(b) for b in next(iter(weights.values())).buffers]

    def keep(self, **vectors: np.ndarray | None) -> None:
        """Registers small f32 vectors (signs, norms, decays)."""
        for name, v in vectors.items():
            self.register_buffer(name, None if v is None else f32(v), persistent=False)


class Fused(Stored):
    """Matrices of one input under one rotation: at most one hadamard, then one qmatmul."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.rows, self.columns, r = weight.rows, weight.columns, weight.rotation
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
            Fused(fuse_rows([weights[i] for i in g])) for g in groups.values()
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


class Head(QLinear):
    """Logits, or with the final norm in one native call the largest of them.

    Args:
        norm: f32 [hidden], of the model's last RMSNorm, as it is used. eps: its epsilon.
    """

    def __init__(self, weight: Weight, norm: np.ndarray, eps: float) -> None:
        super().__init__(weight, dtype=torch.float32)
        packed = pack(weight)
        signs, tables, ints = packed.arguments()
        inputs = [..., norm, *signs, *tables, *packed.buffers]
        self.bound = _cpu.Bound("qmatmul_top", inputs, 2, ints, [eps])

    def top(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` largest logits of f32 x [tokens, hidden] before the final norm: values f32
        and tokens i32 [tokens, count], equal ones by index."""
        values = x.new_empty((len(x), count))
        index = torch.empty_like(values, dtype=torch.int32)
        self.bound([x], [values, index], [])
        return values, index


class QEmbedding(Stored):
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
