"""The ops of `_cpu` as lazy functions of one exact MLX (csrc/bind/mlx.cpp), on its CPU streams."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

def call(
    op: Any,
    inputs: Sequence[Any],
    leads: Sequence[int],
    outputs: Sequence[tuple[int, int, Sequence[int], mx.Dtype]],
    states: Sequence[mx.array],
    ints: Sequence[int],
    floats: Sequence[float],
) -> list[mx.array]:
    """Outputs, then new states; arguments as in `mlx_host.call`, ``op`` of `_cpu.op`.

    Raises ContractError, naming argument and numbers.
    """
