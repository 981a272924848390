"""Runs launch plans of `hadamoe.metal_plan` through MLX, lazily, on its Metal device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import mlx.core as mx

from . import metal_delta, metal_kv, metal_moe, metal_products
from .gpu_calls import Front, Plans
from .gpu_plan import Output
from .metal_plan import Launch, source

_DTYPES = {
    n: getattr(mx, n)
    for n in ("float32", "float16", "bfloat16", "uint8", "uint32", "int32", "int8")
}


@cache
def _kernel(
    kernel: str, file: str, constants: tuple, inputs: tuple, outputs: tuple, shared: tuple
) -> Any:
    """The kernel of every launch that has these in common: its text is made once."""
    names = [Output(name, (), "") for name in outputs]
    one = Launch(kernel, file, dict(constants), dict(inputs), (*names,), (1, 1, 1), 1, shared)
    return mx.fast.metal_kernel(
        name=one.name,
        input_names=one.present,
        output_names=list(outputs),
        header=source(file),
        source=one.body,
    )


def run(launch: Launch, arrays: Mapping[str, mx.array | Sequence[int]]) -> list[mx.array]:
    """The outputs of a launch, one array for each.

    Args:
        arrays: every input that is not absent, by name; integers are handed over as int32.
    """
    outputs, inputs = launch.outputs, launch.inputs
    kernel = _kernel(
        launch.kernel,
        launch.file,
        tuple(launch.constants.items()),
        tuple(inputs.items()),
        tuple([out.name for out in outputs]),
        launch.shared,
    )
    x, y, z = launch.groups
    return kernel(
        inputs=[_argument(arrays[name]) for name, absent in inputs.items() if not absent],
        output_shapes=[out.shape for out in outputs],
        output_dtypes=[_DTYPES[out.dtype] for out in outputs],
        grid=(x * launch.threads, y, z),
        threadgroup=(launch.threads, 1, 1),
    )


def _argument(a: mx.array | Sequence[int]) -> mx.array:
    """Few integers stay few: MLX passes those in constant memory. Arrays get zeros behind them,
    where they are so small that they would go there too."""
    if not isinstance(a, mx.array):
        return mx.array(a, mx.int32)
    return a if a.size >= 8 else mx.pad(a.reshape(-1), (0, 8 - a.size))


FRONT = Front(
    Plans(metal_products, metal_moe, metal_delta, metal_kv),
    *(mx.array, run, mx.argsort, mx.concatenate, mx.fast.rms_norm),
)
