"""The GPU that MLX computes on: launches of our kernels on it, as `gpu_calls` wants them.

MLX has the same arrays on either device; which `Front` is in front of them is asked at each call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import mlx.core as mx

from . import gpu_calls, mlx_cuda, mlx_metal
from .gpu_calls import Front, Resident
from .packed import PackedWeight


def device() -> Literal["metal", "cuda"] | None:
    """What MLX computes on now; None for the CPU."""
    if mx.default_device() != mx.gpu:
        return None
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else None


def available() -> bool:
    """Whether MLX computes on a GPU now."""
    return device() is not None


def front() -> Front:
    """The front end of the device that MLX computes on now."""
    return mlx_cuda.FRONT if device() == "cuda" else mlx_metal.FRONT


def run(launch: Any, arrays: Mapping[str, Any]) -> list[mx.array]:
    """The outputs of a launch (`mlx_metal.run`, `mlx_cuda.run`)."""
    return front().run(launch, arrays)


def resident(*weights: PackedWeight) -> Resident:
    """`gpu_calls.resident`."""
    return gpu_calls.resident(front(), *weights)


def product(x: mx.array, w: Resident, **options: Any) -> mx.array:
    """`gpu_calls.product`."""
    return gpu_calls.product(front(), x, w, **options)
