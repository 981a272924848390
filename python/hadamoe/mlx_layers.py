"""Stored matrices as MLX modules: linear layers and the embedding.

What a layer multiplies by is no parameter of it: it stays in the mapped files, so
``model.parameters()`` is small, nothing trains and nothing is copied.
"""

from __future__ import annotations

from functools import cached_property

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import mlx_gpu, ops
from .packed import PackedWeight, pack
from .weight import Rotation, Weight, fuse_rows

__all__ = ["QEmbedding", "QLinear"]


class QLinear(nn.Module):
    """y = x W^T for stored matrices that share an input; results side by side, in order.

    Args:
        weights: one matrix, or several of equal in_features; on the CPU one call per distinct
            rotation, on a GPU one launch.
    """

    def __init__(self, *weights: Weight) -> None:
        super().__init__()
        self.rows = sum(w.rows for w in weights)
        self.matrices = _Matrices(weights)

    def __call__(
        self,
        x: mx.array,
        norm: tuple[mx.array, float] | None = None,
        residual: mx.array | None = None,
    ) -> mx.array:
        """``residual + rmsnorm(x) W^T``, x's dtype.

        Args:
            x: f32, bf16 or f16 ``[..., in]``.
            norm: f32 gamma ``[in]`` and eps; None for no norm.
            residual: ``[..., out]`` of x's dtype, or None.
        """
        if mlx_gpu.available():
            flat = x.reshape(-1, x.shape[-1])
            added = None if residual is None else residual.reshape(-1, self.rows)
            weights = mlx_gpu.resident(*self.matrices.apart)
            y = mlx_gpu.product(flat, weights, norm=norm, residual=added)
            return y.reshape(*x.shape[:-1], self.rows)
        wide = x.astype(mx.float32)
        y = self.matrices.product(wide if norm is None else mx.fast.rms_norm(wide, *norm))
        return (y if residual is None else residual + y).astype(x.dtype)

    def _extra_repr(self) -> str:
        return f"output_dims={self.rows}"


class _Matrices:
    """Matrices of one input: fused by rotation, and each by itself."""

    def __init__(self, weights: tuple[Weight, ...]) -> None:
        self.weights = weights
        groups: dict[Rotation | None, list[int]] = {}
        for i, w in enumerate(weights):
            groups.setdefault(w.rotation, []).append(i)
        self.groups = list(groups.values())
        self.fused = [pack(fuse_rows([weights[i] for i in g])) for g in self.groups]

    @cached_property
    def apart(self) -> tuple[PackedWeight, ...]:
        packed = pack(*self.weights)
        return packed if isinstance(packed, tuple) else (packed,)

    def product(self, x: mx.array) -> mx.array:
        """f32 ``[..., in]`` -> ``[..., out]``."""
        parts: dict[int, mx.array] = {}
        for group, w in zip(self.groups, self.fused, strict=True):
            r = w.rotation
            turned = x if r is None else ops.hadamard(x, block=r.block, pre=r.pre, post=r.post)
            y = ops.qmatmul(turned, w)
            if len(self.groups) == 1:
                return y
            ends = np.cumsum([self.weights[i].rows for i in group])
            parts |= zip(group, mx.split(y, ends[:-1].tolist(), -1), strict=True)
        return mx.concatenate([parts[i] for i in range(len(parts))], -1)


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
