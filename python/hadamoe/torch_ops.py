"""The ops for torch tensors, on the CPU and on a GPU: what `hadamoe.ops` calls, documented there.

Each is one of ``torch.ops.hadamoe.*`` over tensors that a packed weight keeps, so torch.compile
sees constants, and a GPU's copy of a weight is made once.
"""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from . import torch_cuda, torch_mps  # noqa: F401  these register their operators
from .errors import ContractError
from .packed import PackedWeight
from .roles import AttentionWeights, DeltaWeights, MoeWeights, RoleWeights
from .torch_operators import operators

Tensor = torch.Tensor

#: packed weights -> a device -> tensors of what they are made of
_kept: WeakKeyDictionary[PackedWeight | RoleWeights, dict[torch.device, tuple]] = (
    WeakKeyDictionary()
)


def as_tensor(array: Any) -> Tensor:
    """A tensor over a numpy array's own memory, read-only maps included: no op writes a weight."""
    if isinstance(array, Tensor):
        return array
    if torch.compiler.is_compiling():
        return torch.from_numpy(array)  # Dynamo cannot trace the rest
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _beside(x: Tensor, v: Any) -> Tensor | None:
    """A vector on the device of x."""
    return None if v is None else as_tensor(v).to(x.device)


@torch.compiler.assume_constant_result
def _constants(weights: PackedWeight | RoleWeights, device: torch.device) -> tuple:
    """(signs, part tables, buffers, integers) of operators, the same each time: signs are on the
    device, tables and buffers the weights' own memory."""
    kept = _kept.setdefault(weights, {})
    if device not in kept:
        signs, tables, ints = weights.arguments()
        signs = [None if s is None else as_tensor(s).to(device) for s in signs]
        buffers = list(map(as_tensor, weights.buffers))
        kept[device] = signs, list(map(as_tensor, tables)), buffers, ints
    return kept[device]


def _dtype(dtype: Any) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    return torch.from_numpy(np.empty(0, dtype)).dtype


# What hadamoe.ops calls for torch tensors; arguments and results are documented there.


def hadamard(x: Tensor, *, block: int | None = None, pre: Any = None, post: Any = None) -> Tensor:
    """`hadamoe.ops.hadamard` on torch tensors."""
    return operators.hadamard(x, _beside(x, pre), _beside(x, post), block or 0, x.dtype)


def dequantize(weight: PackedWeight, rows: Tensor, *, dtype: Any = torch.float32) -> Tensor:
    """`hadamoe.ops.dequantize` with torch rows: ``[..., columns]``, padding still there."""
    if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise ContractError(f"dequantize: rows is {rows.dtype}, needs integers")
    (pre, post), (parts,), buffers, (block,) = _constants(weight, rows.device)
    y = operators.dequantize(parts, rows.long(), buffers, weight.columns, _dtype(dtype))
    return y if block < 0 else operators.hadamard(y, post, pre, block, y.dtype)


def qmatmul(x: Tensor, weight: PackedWeight, *, expert: Tensor | None = None) -> Tensor:
    """`hadamoe.ops.qmatmul` on torch tensors."""
    if expert is not None and expert.shape[:-1] != x.shape[:-1]:
        shapes = tuple(expert.shape), tuple(x.shape)
        raise ContractError("qmatmul: expert has shape {}, x has {}".format(*shapes))
    _, (parts,), buffers, _ = _constants(weight, x.device)
    return operators.qmatmul(x, parts, expert, buffers, weight.rows, x.dtype)


def qmatmul_top(
    x: Tensor, norm: Any, weight: PackedWeight, top: int, eps: float
) -> tuple[Tensor, Tensor]:
    """`hadamoe.ops.qmatmul_top` on torch tensors."""
    signs, (parts,), buffers, (block,) = _constants(weight, x.device)
    return operators.qmatmul_top(x, _beside(x, norm), *signs, parts, buffers, top, block, eps)


def moe_decode(x: Tensor, moe: MoeWeights, *, top_k: int, normalize: bool) -> Tensor:
    """`hadamoe.ops.moe_decode` on torch tensors."""
    signs, tables, buffers, ints = _constants(moe, x.device)
    return operators.moe_decode(x, *signs, *tables, buffers, top_k, normalize, *ints)[0]


def gated_delta(
    proj: Tensor, *arrays: Any, heads: tuple[int, int], head_dims: tuple[int, int], eps: float
) -> Tensor:
    """`hadamoe.ops.gated_delta` on torch tensors; vectors may be numpy's."""
    *vectors, conv_state, state = arrays
    vectors = [_beside(proj, v) for v in vectors]
    sizes = *heads, *head_dims
    return operators.gated_delta(proj, *vectors, conv_state, state, *sizes, eps, proj.dtype)


def attention(
    proj: Tensor,
    q_norm: Any,
    k_norm: Any,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
    keys: Tensor,
    values: Tensor,
    *,
    heads: int,
    past: int,
    eps: float,
) -> Tensor:
    """`hadamoe.ops.attention` on torch tensors."""
    norms = [_beside(proj, v) for v in (q_norm, k_norm)]
    return operators.attention(
        proj, *norms, cos, sin, mask, keys, values, heads, past, eps, proj.dtype
    )


def attention_block(
    x: Tensor,
    per_token: tuple[Tensor, Tensor, Tensor | None],
    norm: Any,
    weights: AttentionWeights,
    norms: tuple[Any, Any],
    keys: Tensor,
    values: Tensor,
    past: int,
    eps: float,
) -> Tensor:
    """`hadamoe.ops.attention_block` on torch tensors."""
    signs, tables, buffers, ints = _constants(weights, x.device)
    norm, *norms = (_beside(x, v) for v in (norm, *norms))
    fixed = *per_token, norm, *signs, *norms, *tables, buffers
    return operators.attention_block(x, *fixed, keys, values, past, *ints, eps)


def gated_delta_block(
    x: Tensor,
    mask: Tensor | None,
    norm: Any,
    weights: DeltaWeights,
    vectors: tuple[Any, ...],
    states: tuple[Tensor, Tensor],
    sizes: tuple[int, ...],
    eps: float,
) -> Tensor:
    """`hadamoe.ops.gated_delta_block` on torch tensors."""
    signs, tables, buffers, ints = _constants(weights, x.device)
    norm, *vectors = (_beside(x, v) for v in (norm, *vectors))
    fixed = norm, *signs, *vectors, *tables, buffers
    return operators.gated_delta_block(x, mask, *fixed, *states, *sizes, *ints, eps)


def moe_block(
    x: Tensor, norm: Any, moe: MoeWeights, *, top_k: int, normalize: bool, eps: float
) -> Tensor:
    """`hadamoe.ops.moe_block` on torch tensors."""
    signs, tables, buffers, ints = _constants(moe, x.device)
    fixed = _beside(x, norm), *signs, *tables, buffers
    return operators.moe_block(x, *fixed, top_k, normalize, *ints, eps)
