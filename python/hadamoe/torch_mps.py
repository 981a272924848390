"""PyTorch's operators ``torch.ops.hadamoe.*`` on a Mac's GPU (device "mps"), through Metal.

The kernels and their launch plans are those of MLX's Metal device. Importing this registers them.
Activations, states and signs are on "mps"; part tables and mapped files stay on the CPU: a weight
is copied to the GPU once, when it is first used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from . import gpu_calls, metal_delta, metal_moe, metal_products
from .errors import ContractError
from .gpu_calls import Front, Plans, Resident, dtype_name
from .metal_plan import Launch, shader
from .packed import PackedWeight, rotated_columns
from .roles import MoeWeights
from .torch_ops import library
from .weight import Rotation

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
    return Front(
        Plans(metal_products, metal_moe, metal_delta),
        lambda a: torch.from_numpy(np.ascontiguousarray(a)).to(device),
        run,
        lambda a: torch.argsort(a, stable=True).to(torch.int32),
        torch.sigmoid,
        torch.cat,
        lambda x, gamma, eps: torch.nn.functional.rms_norm(x, gamma.shape, gamma, eps),
    )


def _front(x: Tensor) -> Front:
    return front(str(x.device))


#: What was packed together, by its first table of parts, while some module holds that.
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _weight(
    parts: Tensor, buffers: Sequence[Tensor], columns: int, rotation: Rotation | None = None,
    in_features: int = 0,
) -> PackedWeight:  # fmt: skip
    """The weight that an operator is given as a table of parts."""
    if parts.device.type != "cpu":
        raise ContractError(f"mps: a part table is on {parts.device}, needs cpu")
    table = parts.numpy()
    rows = int(table[0, :, 0].sum())
    arrays = tuple(b.numpy() for b in buffers)
    return PackedWeight(table, arrays, rows, columns, len(table), rotation, in_features or columns)


def _stored(x: Tensor, parts: Tensor, buffers: Sequence[Tensor], columns: int) -> Resident:
    if parts not in _packed:
        _packed[parts] = _weight(parts, buffers, columns)
    return gpu_calls.resident(_front(x), _packed[parts])


def hadamard(x: Tensor, pre: Any, post: Any, block: int, dtype: torch.dtype) -> Tensor:
    """``hadamoe::hadamard``; block 0 splits the columns into powers of two."""
    return gpu_calls.hadamard(_front(x), x, block=block or None, pre=pre, post=post).to(dtype)


def dequantize(
    parts: Tensor, rows: Tensor, buffers: Sequence[Tensor], columns: int, dtype: torch.dtype
) -> Tensor:
    """``hadamoe::dequantize``."""
    w, name = _stored(rows, parts, buffers, columns), dtype_name(dtype)
    return gpu_calls.dequantize(_front(rows), w, rows, name)


def qmatmul(
    x: Tensor, parts: Tensor, expert: Tensor | None, buffers: Sequence[Tensor], rows: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``hadamoe::qmatmul``; x has been rotated."""
    w = _stored(x, parts, buffers, x.shape[-1])
    flat = None if expert is None else expert.reshape(-1, expert.shape[-1]).to(torch.int32)
    y = gpu_calls.product(_front(x), x.reshape(-1, x.shape[-1]), w, expert=flat, rotated=True)
    lead = x.shape[:-1] if expert is None else expert.shape
    return y.reshape(*lead, rows).to(dtype)


def _moe(
    x: Tensor, signs: Sequence[Tensor | None], tables: Sequence[Tensor],
    buffers: Sequence[Tensor], blocks: Sequence[int], rotated: int,
) -> MoeWeights:  # fmt: skip
    """The weights of an operator's arguments, packed once."""
    if tables[0] in _packed:
        return _packed[tables[0]]
    numbers = [None if s is None else s.cpu().numpy() for s in signs]
    turns = [
        None if block < 0 else Rotation(block or None, *numbers[2 * i : 2 * i + 2])
        for i, block in enumerate(blocks)
    ]
    rows = {
        name: int(t[0, :, 0].sum())
        for name, t in zip(MoeWeights.__dataclass_fields__, tables, strict=True)
    }
    inner = {"down": rows["gate_up"] // 2, "shared_down": rows["shared_gate_up"] // 2}
    made = {}
    for i, (name, table) in enumerate(zip(MoeWeights.__dataclass_fields__, tables, strict=True)):
        width = inner.get(name, x.shape[-1])
        turn = turns[name in inner] if rotated >> i & 1 else None
        columns = width if turn is None else rotated_columns(width, turn.block)
        made[name] = _weight(table, buffers, columns, turn, width)
    _packed[tables[0]] = MoeWeights(**made)
    return _packed[tables[0]]


def moe_decode(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``hadamoe::moe_decode``; the choice of experts stays inside the kernels: it is returned as -1
    and NaN."""
    *arrays, buffers, top_k, normalize, hidden_block, inner_block, rotated = arguments
    weights = _moe(x, arrays[:4], arrays[4:], buffers, (hidden_block, inner_block), rotated)
    y = gpu_calls.moe(_front(x), x.float(), weights, top_k=top_k, normalize=normalize)
    unknown = x.new_full((x.numel() // x.shape[-1], top_k), float("nan"), dtype=torch.float32)
    return y.to(x.dtype), torch.full_like(unknown, -1, dtype=torch.int32), unknown


def gated_delta(proj: Tensor, *arguments: Any) -> Tensor:
    """``hadamoe::gated_delta``: writes conv_state and state."""
    *arrays, hk, hv, dk, dv, eps, dtype = arguments
    sizes = {"heads": (hk, hv), "head_dims": (dk, dv), "eps": eps}
    y, *states = gpu_calls.gated_delta(_front(proj), proj, *arrays, **sizes)
    for old, new in zip(arrays[-2:], states, strict=True):
        old.copy_(new)
    return y.to(dtype)


for _op in (hadamard, dequantize, qmatmul, moe_decode, gated_delta):
    library.impl(_op.__name__, _op, "MPS")
