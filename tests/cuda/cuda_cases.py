"""verify's cases through launches in the simulator: what every CUDA product is tested with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from simt import cuda_launch

from hadamoe import cuda_delta, cuda_moe, cuda_products, gpu_calls

PLANS = gpu_calls.Plans(cuda_products, cuda_moe, cuda_delta)
#: CPU tensors, launches in the simulator.
FRONT = gpu_calls.Front(
    PLANS,
    lambda a: torch.from_numpy(np.ascontiguousarray(a)),
    lambda launch, arrays: cuda_launch.run(launch, arrays),
    lambda a: torch.argsort(a, stable=True).to(torch.int32),
    torch.cat,
    lambda x, gamma, eps: torch.nn.functional.rms_norm(x, gamma.shape, gamma, eps),
)


def to_torch(a: Any) -> Any:
    return torch.from_numpy(np.ascontiguousarray(a)) if isinstance(a, np.ndarray) else a


def to_numpy(a: Any) -> Any:
    if isinstance(a, tuple | list):
        return tuple(map(to_numpy, a))
    return (a.float() if a.dtype == torch.bfloat16 else a).numpy()
