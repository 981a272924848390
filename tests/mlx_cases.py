"""verify's cases through MLX's arrays: what its GPU kernels are tested with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from hadamoe import mlx_ops, ops
from hadamoe.verify import claims


def to_mlx(a: Any) -> Any:
    return mx.array(a) if isinstance(a, np.ndarray) else a


def to_numpy(a: Any) -> Any:
    if isinstance(a, tuple):
        return tuple(map(to_numpy, a))
    return np.array(a.astype(mx.float32) if a.dtype == mx.bfloat16 else a)


class _Through:
    """`hadamoe.mlx_ops` for numpy's arrays."""

    def __getattr__(self, name: str) -> Any:
        op = getattr(mlx_ops, name)

        def call(*args: Any, **options: Any) -> Any:
            return to_numpy(op(*map(to_mlx, args), **{k: to_mlx(v) for k, v in options.items()}))

        return call


@contextmanager
def on_mlx() -> Iterator[None]:
    """Inside, `hadamoe.ops` takes numpy's arrays the way MLX's go."""
    before = ops._module
    ops._module = lambda _: _Through()
    try:
        yield
    finally:
        ops._module = before


def check(case: claims.Case) -> float:
    """`claims.compare` of a case run on MLX's arrays."""
    with on_mlx():
        return claims.compare(case, case.run())
