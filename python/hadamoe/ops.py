"""The ops, for any framework's arrays: numpy, torch and (eagerly) MLX arrays on the CPU.

What each op means is written in numpy in `hadamoe.reference`; the CPU code of op ``stem`` is
``csrc/cpu/stem.h``. Every op checks its arguments before it writes anything and raises
`ContractError` with the argument and the numbers; an instance without code raises
`UnsupportedError`. All arithmetic is f32; bf16 and f16 are storage only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _cpu
from .errors import ContractError
from .packed import PackedWeight, instances, pack, supports
from .weight import Rotation, Weight

__all__ = [
    "MoeWeights",
    "PackedWeight",
    "dequantize",
    "gated_delta",
    "hadamard",
    "instances",
    "isa",
    "isas",
    "moe_decode",
    "pack",
    "qmatmul",
    "set_isa",
    "set_threads",
    "supports",
    "threads",
]


def isas() -> list[str]:
    """Instruction sets this machine runs, best last."""
    return _cpu.isas()


def isa() -> str:
    """The instruction set in use."""
    return _cpu.isa()


def set_isa(name: str) -> None:
    """Use another of `isas()`; for tests and measurements."""
    _cpu.set_isa(name)


def threads() -> int:
    """Threads an op may use."""
    return _cpu.threads()


#: More would only take a machine down: chunks are claimed, not handed out.
MAX_THREADS = 1024


def set_threads(count: int) -> None:
    """Use ``count`` threads (1 to `MAX_THREADS`). Not while an op runs."""
    if not 1 <= count <= MAX_THREADS:
        raise ContractError(f"set_threads: count is {count}, needs 1 to {MAX_THREADS}")
    _cpu.set_threads(count)


def _packed(op: str, weight: Weight | PackedWeight) -> PackedWeight:
    if isinstance(weight, PackedWeight):
        return weight
    if not isinstance(weight, Weight):
        raise ContractError(f"{op}: weight is {type(weight).__name__}, needs a Weight or pack(it)")
    return pack(weight)


def _framework(op: str, name: str, x: Any, columns: int | None = None) -> Any:
    """The module that runs ops on arrays like ``x``; None for numpy.

    Checks what a kernel cannot see: a weight's table of parts does not say how wide it is.
    """
    module = _module(x)
    if module is NotImplemented:
        kind = type(x).__name__
        raise ContractError(f"{op}: {name} is {kind}, needs a numpy, torch or MLX array")
    if name == "x" and (x.ndim == 0 or x.shape[-1] == 0):
        raise ContractError(f"{op}: x has shape {tuple(x.shape)}, needs at least one column")
    if columns is not None and x.shape[-1] != columns:
        raise ContractError(f"{op}: x has k={x.shape[-1]}, needs {columns}")
    return module


def _module(x: Any) -> Any:
    name = type(x).__module__.split(".")[0]
    if name == "torch":
        from . import torch_ops

        return torch_ops
    if name == "mlx":
        from . import mlx_ops

        return mlx_ops
    return None if isinstance(x, np.ndarray) else NotImplemented


_BLOCKS = frozenset(1 << i for i in range(15))


def rotated_columns(columns: int, block: int | None) -> int:
    """Columns of a rotated row: padded to whole blocks."""
    return columns if block is None else -(-columns // block) * block


def hadamard(
    x: Any,
    *,
    block: int | None = None,
    pre: Any = None,
    post: Any = None,
    inverse: bool = False,
) -> Any:
    """Rotate the last axis: ``post * H(pre * x)``, H orthonormal per block, natural order.

    Args:
        x: ``[..., k]``, f32, f16 or bf16. Padded with zeros to a whole number of blocks.
        block: power of two to 16384; None splits k into its distinct powers of two, largest first.
        pre, post: f32 ``[p]`` signs, p dividing the padded k, repeated along it; None for ones.
        inverse: undo it: ``pre * H(post * x)`` (H is its own inverse).

    Returns:
        ``[..., k']`` of x's dtype, ``k' = k`` rounded up to whole blocks.

    Sources: turboquant-vllm (block 128, both signs), jang (powers of two, pre only).
    """
    if block is not None and block not in _BLOCKS:
        raise ContractError(f"hadamard: block is {block}, needs a power of two up to 16384 or None")
    if inverse:
        pre, post = post, pre
    if module := _framework("hadamard", "x", x):
        return module.hadamard(x, block=block, pre=pre, post=post)
    flat = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    y = np.empty((len(flat), rotated_columns(x.shape[-1], block)), x.dtype)
    _cpu.call("hadamard", [flat, pre, post], [y], [block or 0], [])
    return y.reshape(*x.shape[:-1], y.shape[-1])


def dequantize(weight: Weight | PackedWeight, rows: Any = None, *, dtype: Any = np.float32) -> Any:
    """Rows of a weight as numbers, its rotation undone.

    Args:
        rows: integer ``[m]``, flat row numbers (expert-major), each in ``[0, E * n)``; None for
            all. A torch or MLX array selects that framework for the result.
        dtype: of the result: f32 or f16.

    Returns:
        ``[m, in_features]``. Before un-rotation a value is ``scale * table[code] (+ bias)``, each
        operation rounded once to f32, the same bits on every instruction set.
    """
    w = _packed("dequantize", weight)
    if rows is None:
        rows = np.arange(w.experts * w.rows)
    if isinstance(rows, Sequence):
        rows = np.array(rows, None if len(rows) else np.int64)
    if module := _framework("dequantize", "rows", rows):
        return module.dequantize(w, rows, dtype=dtype)[..., : w.in_features]
    if rows.dtype.kind not in "iu":
        raise ContractError(f"dequantize: rows is {rows.dtype}, needs integers")
    try:
        dtype = np.dtype(dtype)
    except TypeError:
        raise ContractError(f"dequantize: dtype is {dtype}, needs float32 or float16") from None
    index = np.ascontiguousarray(rows, np.int64)
    y = np.empty((*index.shape, w.columns), dtype)
    flat = y.reshape(-1, w.columns)
    _cpu.call("dequantize", [w.parts, index.reshape(-1), *w.buffers], [flat], [w.columns], [])
    if w.rotation is not None:
        r = w.rotation
        y = hadamard(y, block=r.block, pre=r.pre, post=r.post, inverse=True)
    return y[..., : w.in_features]


def qmatmul(x: Any, weight: Weight | PackedWeight, *, expert: Any = None) -> Any:
    """``y = x @ W^T`` on the stored codes. Does not rotate: pass x through `hadamard` first.

    Args:
        x: ``[..., k]``, f32, f16 or bf16; k is the weight's (padded) columns.
        weight: a `Weight`, or `pack(weight)` where the same weight is used again.
        expert: integer ``[..., a]``: which experts each row of x goes through; None for one matrix.

    Returns:
        ``[..., n]``, or ``[..., a, n]`` with ``expert``; x's dtype. A row of the result never
        depends on the other rows, the number of threads or the batch.
    """
    w = _packed("qmatmul", weight)
    if module := _framework("qmatmul", "x", x, w.columns):
        return module.qmatmul(x, w, expert=expert)
    flat = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    shape = (len(flat), w.rows)
    if expert is not None:
        expert = np.ascontiguousarray(expert)
        if expert.shape[:-1] != x.shape[:-1]:
            raise ContractError(f"qmatmul: expert has shape {expert.shape}, x has {x.shape}")
        expert = expert.reshape(len(flat), -1)
        shape = (len(flat), expert.shape[1], w.rows)
    y = np.empty(shape, x.dtype)
    _cpu.call("qmatmul", [flat, w.parts, expert, *w.buffers], [y], [], [])
    return y.reshape(*x.shape[:-1], *shape[1:])


@dataclass(frozen=True, slots=True)
class MoeWeights:
    """The six matrices of one mixture-of-experts block, packed with shared buffers.

    ``gate_up`` and ``shared_gate_up`` hold gate rows, then up rows. Weights that carry a rotation
    share it: ``hidden`` for those that read the hidden state, ``inner`` for the down projections.
    """

    router: PackedWeight
    gate_up: PackedWeight
    down: PackedWeight
    shared_gate_up: PackedWeight
    shared_down: PackedWeight
    shared_gate: PackedWeight

    @classmethod
    def of(cls, **weights: Weight) -> MoeWeights:
        """Pack the six weights, given by their names, together.

        Raises:
            ContractError: a name is missing or unknown, widths do not fit, or weights of one input
                have different rotations.
        """
        names = tuple(cls.__dataclass_fields__)
        if weights.keys() != set(names):
            raise ContractError(f"MoeWeights.of: has {sorted(weights)}, needs {sorted(names)}")
        moe = cls(*pack(*(weights[name] for name in names)))
        inner = {"down": moe.gate_up.rows // 2, "shared_down": moe.shared_gate_up.rows // 2}
        for name, w in zip(names, moe.roles, strict=True):
            needs = inner.get(name, moe.hidden_size)
            needs = rotated_columns(needs, w.rotation.block) if w.rotation else needs
            if w.columns != needs:
                raise ContractError(f"MoeWeights.of: {name} has k={w.columns}, needs {needs}")
        moe.hidden, moe.inner  # noqa: B018  both raise where rotations differ
        return moe

    @property
    def roles(self) -> tuple[PackedWeight, ...]:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    @property
    def hidden_size(self) -> int:
        """Columns of x: the down projections' rows."""
        return self.down.rows

    @property
    def hidden(self) -> Rotation | None:
        """Rotation of the hidden state, for the weights that want one."""
        return _shared_rotation(self.router, self.gate_up, self.shared_gate_up, self.shared_gate)

    @property
    def inner(self) -> Rotation | None:
        """Rotation of the activations between up and down."""
        return _shared_rotation(self.down, self.shared_down)

    def arguments(self, top_k: int, normalize: bool) -> tuple[list[Any], list[Any], list[int]]:
        """(signs, parts tables, integers) of the native op, in its order."""
        hidden, inner = self.hidden, self.inner
        signs = [s for r in (hidden, inner) for s in ((r.pre, r.post) if r else (None, None))]
        blocks = [-1 if r is None else r.block or 0 for r in (hidden, inner)]
        mask = sum(1 << i for i, w in enumerate(self.roles) if w.rotation is not None)
        return signs, [w.parts for w in self.roles], [top_k, int(normalize), *blocks, mask]


def _shared_rotation(*weights: PackedWeight) -> Rotation | None:
    found = {w.rotation for w in weights if w.rotation is not None}
    if len(found) > 1:
        raise ContractError("moe_decode: weights of one input have different rotations, needs one")
    return found.pop() if found else None


def moe_decode(x: Any, moe: MoeWeights, *, top_k: int, normalize: bool = True) -> Any:
    """A whole mixture-of-experts block, any number of tokens.

    ``p = softmax(router(x))``; the top_k largest (ties: the lower index), renormalised to sum 1
    when ``normalize``; ``y = sum_k p_k * down_k(silu(gate_k(x)) * up_k(x)) +
    sigmoid(shared_gate(x)) * shared(x)``. Rotations are applied inside, once per token and once per
    inner state.

    Args:
        x: ``[..., hidden]``, f32, f16 or bf16, not rotated.

    Returns:
        y ``[..., hidden]`` of x's dtype.
    """
    if module := _framework("moe_decode", "x", x, moe.hidden_size):
        return module.moe_decode(x, moe, top_k=top_k, normalize=normalize)
    flat = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    y = np.empty_like(flat)
    signs, tables, ints = moe.arguments(top_k, normalize)
    _cpu.call("moe_decode", [flat, *signs, *tables, *moe.router.buffers], [y], ints, [])
    return y.reshape(x.shape)


def gated_delta(
    proj: Any,
    conv_weight: Any,
    a_log: Any,
    dt_bias: Any,
    norm: Any,
    conv_state: Any,
    state: Any,
    *,
    heads: tuple[int, int],
    head_dims: tuple[int, int],
    eps: float = 1e-6,
) -> Any:
    """One Gated DeltaNet layer between its projections; states are updated in place.

    Causal convolution and SiLU, l2-normalised q and k, the gated delta rule token by token, gated
    RMSNorm. Any number of tokens: t single calls give the same bits as one call with t tokens.

    Args:
        proj: ``[b, t, c + hv*dv + 2*hv]``: qkv (c = 2*hk*dk + hv*dv), z, b, a side by side.
        conv_weight: f32 ``[c, kernel]``.
        a_log, dt_bias: f32 ``[hv]``.
        norm: f32 ``[dv]``, used as it is.
        conv_state: f32 ``[b, c, kernel]``, the last inputs of the convolution, newest last.
        state: f32 ``[b, hv, dk, dv]``.
        heads: (hk, hv).
        head_dims: (dk, dv).

    Returns:
        y ``[b, t, hv*dv]`` of proj's dtype.

    Source: Yang et al., Gated Delta Networks, arXiv 2412.06464; transformers' qwen3_5_moe.
    """
    module = _framework("gated_delta", "proj", proj)
    if proj.ndim != 3:
        raise ContractError(f"gated_delta: proj has {proj.ndim} dimensions, needs 3")
    if module:
        return module.gated_delta(
            proj, conv_weight, a_log, dt_bias, norm, conv_state, state,
            heads=heads, head_dims=head_dims, eps=eps,
        )  # fmt: skip
    b, t, _ = proj.shape
    y = np.empty((b, t, heads[1] * head_dims[1]), proj.dtype)
    _cpu.call(
        "gated_delta",
        [np.ascontiguousarray(proj), conv_weight, a_log, dt_bias, norm],
        [y, conv_state, state],
        [*heads, *head_dims],
        [eps],
    )
    return y
