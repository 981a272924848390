"""PyTorch's operators ``torch.ops.hadamoe.*`` on a Mac's GPU (device "mps"), through Metal.

The kernels and their launch plans are those of MLX's Metal device. Importing this registers them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from . import metal_delta, metal_moe, metal_products
from .gpu_calls import Front, Plans, dtype_name
from .metal_plan import Launch, shader
from .torch_gpu import new_front, register

Tensor = torch.Tensor


@cache
def _kernel(name: str, text: str) -> Any:
    return getattr(torch.mps.compile_shader(text), name)


def run(launch: Launch, arrays: Mapping[str, Tensor | Sequence[int]]) -> list[Tensor]:
    """The outputs of a launch, one tensor for each.

    Args:
        arrays: every input that is not absent, by name; integers are handed over as int32.
    """
    inputs = [arrays[name] for name in launch.present]
    inputs = [a.contiguous() if isinstance(a, Tensor) else list(a) for a in inputs]
    device = next(a.device for a in inputs if isinstance(a, Tensor))
    outputs = [
        torch.empty(out.shape, dtype=getattr(torch, out.dtype), device=device)
        for out in launch.outputs
    ]
    types = tuple(dtype_name(a.dtype) if isinstance(a, Tensor) else None for a in inputs)
    x, y, z = launch.groups
    _kernel(launch.name, shader(launch, types))(
        *inputs,
        *outputs,
        threads=(x * launch.threads, y, z),
        group_size=(launch.threads, 1, 1),
        arg_casts="int32",
    )
    return outputs


@cache
def front(device: str) -> Front:
    """The front end of Metal launches on tensors of a device."""
    return new_front(
        Plans(metal_products, metal_moe, metal_delta),
        lambda a: torch.from_numpy(np.ascontiguousarray(a)).to(device),
        run,
    )


#: name -> operator
OPERATORS = register(lambda x: front(str(x.device)), "MPS")
