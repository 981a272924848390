"""Stored matrices as MLX modules: linear layers and the embedding.

What a layer multiplies by is no parameter of it: it stays in the mapped files, so
``model.parameters()`` is small, nothing trains and nothing is copied.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from . import ops
from .packed import pack
from .weight import Rotation, Weight, fuse_rows

__all__ = ["QEmbedding", "QLinear"]


class _Fused(nn.Module):
    """Matrices of one input under one rotation: at most one hadamard, then one qmatmul."""

    def __init__(self, weights: list[Weight]) -> None:
        super().__init__()
        self.packed, self.rotation = pack(fuse_rows(weights)), weights[0].rotation

    def __call__(self, x: mx.array) -> mx.array:
        if self.rotation is not None:
            r = self.rotation
            x = ops.hadamard(x, block=r.block, pre=r.pre, post=r.post)
        return ops.qmatmul(x, self.packed)


class QLinear(nn.Module):
    """y = x W^T for stored matrices that share an input; results side by side, in order.

    Args:
        weights: one matrix, or several of equal in_features; fused, one call per distinct rotation.
    """

    def __init__(self, *weights: Weight) -> None:
        super().__init__()
        groups: dict[Rotation | None, list[int]] = {}
        for i, w in enumerate(weights):
            groups.setdefault(w.rotation, []).append(i)
        self.fused = [_Fused([weights[i] for i in g]) for g in groups.values()]
        self.groups = _Groups([w.rows for w in weights], list(groups.values()))

    def __call__(self, x: mx.array) -> mx.array:
        """f32, bf16 or f16 ``[..., in]`` -> ``[..., out]`` of x's dtype."""
        y = self.groups.in_order([f(x.astype(mx.float32)) for f in self.fused])
        return y.astype(x.dtype)

    def _extra_repr(self) -> str:
        return f"output_dims={sum(self.groups.rows)}"


class _Groups:
    """Which of several matrices' results lie in which group's, one behind the other."""

    def __init__(self, rows: list[int], groups: list[list[int]]) -> None:
        self.rows, self.groups = rows, groups

    def in_order(self, ys: list[mx.array]) -> mx.array:
        if len(ys) == 1:
            return ys[0]
        found: dict[int, mx.array] = {}
        for y, group in zip(ys, self.groups, strict=True):
            begin = 0
            for i in group:
                found[i] = y[..., begin : begin + self.rows[i]]
                begin += self.rows[i]
        return mx.concatenate([found[i] for i in range(len(self.rows))], -1)


class QEmbedding(nn.Module):
    """Rows of a stored matrix as f32, decoded when asked for; a rotated matrix is rotated back."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.packed = pack(weight)

    def __call__(self, ids: mx.array) -> mx.array:
        """Integers ``[...]`` -> f32 ``[..., hidden]``."""
        return ops.dequantize(self.packed, ids)

    def _extra_repr(self) -> str:
        return f"{self.packed.rows}, {self.packed.in_features}"
