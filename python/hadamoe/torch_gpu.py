"""PyTorch's operators ``torch.ops.hadamoe.*`` as sequences of launches, the same for every GPU.

The first argument of each, ``front``, finds the `Front` of a tensor's device. Activations, states
and signs are on the GPU; part tables and mapped files stay on the CPU: a weight is copied to the
GPU once, when it is first used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from . import gpu_calls
from .errors import ContractError
from .gpu_calls import Front, Plans, Resident, dtype_name
from .packed import PackedWeight, rotated_columns
from .roles import MoeWeights
from .torch_operators import library
from .weight import Rotation

Tensor = torch.Tensor
FrontOf = Callable[[Tensor], Front]


def new_front(plans: Plans, array: Callable[[np.ndarray], Tensor], run: Callable) -> Front:
    """A front end of launches on torch's tensors."""
    return Front(
        plans,
        array,
        run,
        lambda a: torch.argsort(a, stable=True).to(torch.int32),
        torch.cat,
        lambda x, gamma, eps: torch.nn.functional.rms_norm(x, gamma.shape, gamma, eps),
    )


def register(front: FrontOf, key: str) -> dict[str, Callable]:
    """The operators of a GPU, registered under a dispatch key."""
    made = {op.__name__: partial(op, front) for op in OPERATORS}
    for name, op in made.items():
        library.impl(name, op, key)
    return made


#: What was packed, and what together, by its (first) table of parts, while somebody holds that.
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_together: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def weight_of(
    parts: Tensor, buffers: Sequence[Tensor], columns: int, rotation: Rotation | None = None,
    in_features: int = 0,
) -> PackedWeight:  # fmt: skip
    """The weight that an operator is given as a table of parts."""
    if parts.device.type != "cpu":
        raise ContractError(f"gpu: a part table is on {parts.device}, needs cpu")
    table = parts.numpy()
    rows = int(table[0, :, 0].sum())
    arrays = tuple(b.numpy() for b in buffers)
    return PackedWeight(table, arrays, rows, columns, len(table), rotation, in_features or columns)


def packed(parts: Tensor, buffers: Sequence[Tensor], columns: int) -> PackedWeight:
    """`weight_of`, the same one each time."""
    if parts not in _packed:
        _packed[parts] = weight_of(parts, buffers, columns)
    return _packed[parts]


def _stored(
    front: FrontOf, x: Tensor, parts: Tensor, buffers: Sequence[Tensor], columns: int
) -> Resident:
    return gpu_calls.resident(front(x), packed(parts, buffers, columns))


def hadamard(
    front: FrontOf, x: Tensor, pre: Any, post: Any, block: int, dtype: torch.dtype
) -> Tensor:
    """``hadamoe::hadamard``; block 0 splits the columns into powers of two."""
    return gpu_calls.hadamard(front(x), x, block=block or None, pre=pre, post=post).to(dtype)


def dequantize(
    front: FrontOf, parts: Tensor, rows: Tensor, buffers: Sequence[Tensor], columns: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``hadamoe::dequantize``."""
    w = _stored(front, rows, parts, buffers, columns)
    return gpu_calls.dequantize(front(rows), w, rows.to(torch.int32), dtype_name(dtype))


def qmatmul(
    front: FrontOf, x: Tensor, parts: Tensor, expert: Tensor | None, buffers: Sequence[Tensor],
    rows: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``hadamoe::qmatmul``; x has been rotated."""
    w = _stored(front, x, parts, buffers, x.shape[-1])
    flat = None if expert is None else expert.reshape(-1, expert.shape[-1]).to(torch.int32)
    y = gpu_calls.product(front(x), x.reshape(-1, x.shape[-1]), w, expert=flat, rotated=True)
    lead = x.shape[:-1] if expert is None else expert.shape
    return y.reshape(*lead, rows).to(dtype)


def _moe(
    x: Tensor, signs: Sequence[Tensor | None], tables: Sequence[Tensor],
    buffers: Sequence[Tensor], blocks: Sequence[int], rotated: int,
) -> MoeWeights:  # fmt: skip
    """The weights of an operator's arguments, packed once."""
    if tables[0] in _together:
        return _together[tables[0]]
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
        made[name] = weight_of(table, buffers, columns, turn, width)
    _together[tables[0]] = MoeWeights(**made)
    return _together[tables[0]]


def moe_decode(front: FrontOf, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``hadamoe::moe_decode``; the choice of experts stays inside the kernels: it is returned as -1
    and NaN."""
    *arrays, buffers, top_k, normalize, hidden_block, inner_block, rotated = arguments
    weights = _moe(x, arrays[:4], arrays[4:], buffers, (hidden_block, inner_block), rotated)
    y = gpu_calls.moe(front(x), x.float(), weights, top_k=top_k, normalize=normalize)
    unknown = x.new_full((x.numel() // x.shape[-1], top_k), float("nan"), dtype=torch.float32)
    y = y.to(x.dtype, copy=not len(unknown))  # of no tokens y is x, which none may return
    return y, torch.full_like(unknown, -1, dtype=torch.int32), unknown


def gated_delta(front: FrontOf, proj: Tensor, *arguments: Any) -> Tensor:
    """``hadamoe::gated_delta``: writes conv_state and state."""
    *arrays, hk, hv, dk, dv, eps, dtype = arguments
    sizes = {"heads": (hk, hv), "head_dims": (dk, dv), "eps": eps}
    return gated_delta_in_place(front(proj), proj, *arrays, **sizes).to(dtype)


def gated_delta_in_place(front: Front, *arrays: Tensor, **sizes: Any) -> Tensor:
    """y of `gpu_calls.gated_delta`; the last two arrays, its states, are written."""
    y, *states = gpu_calls.gated_delta(front, *arrays, **sizes, in_place=True)
    for old, new in zip(arrays[-2:], states, strict=True):
        if old is not new:
            old.copy_(new)
    return y


def qmatmul_top(
    front: FrontOf, x: Tensor, norm: Tensor | None, pre: Any, post: Any, parts: Tensor,
    buffers: Sequence[Tensor], top: int, block: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``hadamoe::qmatmul_top``."""
    on, y = front(x), x.reshape(-1, x.shape[-1]).float()
    if norm is not None:
        y = on.rms_norm(y, norm, eps)
    if block >= 0:
        y = gpu_calls.hadamard(on, y, block=block or None, pre=pre, post=post)
    y = gpu_calls.product(on, y, _stored(front, y, parts, buffers, y.shape[-1]), rotated=True)
    if top > on.plans.products.TOP:
        y = torch.where(y.isnan(), -torch.inf, y)
        values, index = (a[:, :top] for a in y.sort(descending=True, stable=True))
    else:
        values, index = gpu_calls.largest(on, y, top)
    shape = (*x.shape[:-1], top)
    return values.reshape(shape), index.to(torch.int32).reshape(shape)


OPERATORS = (hadamard, dequantize, qmatmul, moe_decode, gated_delta, qmatmul_top)
