"""Runs ops on MLX arrays: our kernels on a GPU; on the CPU native ops, lazily where `_mlx` was
built for the installed MLX, else eagerly.

`_mlx` is one MLX primitive for all ops. Its C++ ABI is that of one exact MLX version, so it is
optional (``HM_MLX=1 pip install .``) and compared before it is imported. Without it an op evaluates
its inputs, which MLX lends through DLPack without a copy, and runs at once: the same numbers, but
nothing to trace for ``mx.compile`` and ``mx.vmap``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import numpy as np

from . import _cpu, mlx_gpu
from .errors import ContractError, UnsupportedError


class Output(NamedTuple):
    """A result: its shape is the first ``kept`` dimensions of input ``like``, then ``tail``."""

    like: int
    kept: int
    tail: tuple[int, ...]
    dtype: mx.Dtype


def _bridge() -> Any:
    """`_mlx`, or None where it is absent or was built for another MLX."""
    try:
        from ._mlx_built import MLX_VERSION
    except ModuleNotFoundError:
        return None
    if mx.__version__ != MLX_VERSION:
        return None
    from . import _mlx

    return _mlx


#: `_mlx`, or None
bridge = _bridge()


def route() -> Literal["metal", "cuda", "lazy", "eager"]:
    """How a call now would run; on a GPU where the op has kernels, else as the CPU would."""
    return mlx_gpu.device() or ("eager" if bridge is None else "lazy")


_entry = functools.cache(_cpu.op)


def call(
    op: str,
    inputs: Sequence[Any],
    leads: Sequence[int],
    outputs: Sequence[Output],
    states: Sequence[mx.array] = (),
    ints: Sequence[int] = (),
    floats: Sequence[float] = (),
    gpu: Callable[[], Sequence[mx.array]] | None = None,
) -> Sequence[mx.array]:
    """Outputs, then new states, of an op.

    Args:
        inputs: in the op's order; numpy arrays are lent as they are, None is absent.
        leads: of the first inputs: how many dimensions in front are the batch, which is one
            dimension to the op; -1 where there is none.
        states: arrays the op reads and replaces: left as they are, the new ones are returned.
        gpu: the same by a GPU's kernels, once the native op's contract has been checked.

    Raises:
        ContractError: at once where shapes, dtypes or weights are wrong; from ``mx.eval`` where
            numbers in arrays are (an expert or row out of range).
        UnsupportedError: a derivative or a batch of weights is asked for; without `_mlx` any use
            inside ``mx.compile`` or ``mx.vmap``.
    """
    for array in (inputs[outputs[0].like], *states):
        if not isinstance(array, mx.array):
            raise ContractError(f"{op}: has a {type(array).__name__}, needs an MLX array")
    if gpu is not None and mlx_gpu.available():
        _check(op, inputs, leads, outputs, states, list(ints), list(floats))
        return gpu()
    if bridge is None:
        return _eager(op, inputs, leads, outputs, states, list(ints), list(floats))
    return bridge.call(
        _entry(op), inputs, list(leads), list(outputs), list(states), list(ints), list(floats)
    )


#: kind of number -> DLPack's type code
_CODES = {mx.signedinteger: 0, mx.unsignedinteger: 1, mx.floating: 2, mx.complexfloating: 5}


def _described(shape: Sequence[int], lead: int, dtype: mx.Dtype) -> tuple:
    """An array as `_cpu.check` takes it."""
    shape = tuple(shape) if lead < 0 else (prod(shape[:lead]), *shape[lead:])
    if dtype in (mx.bfloat16, mx.bool_):
        return shape, 4 if dtype == mx.bfloat16 else 6, dtype.size * 8
    code = next(c for kind, c in _CODES.items() if mx.issubdtype(dtype, kind))
    return shape, code, dtype.size * 8


def _check(
    op: str,
    inputs: Sequence[Any],
    leads: Sequence[int],
    outputs: Sequence[Output],
    states: Sequence[mx.array],
    ints: list[int],
    floats: list[float],
) -> None:
    all_leads = [*leads, *[-1] * (len(inputs) - len(leads))]
    given = [
        _described(a.shape, lead, a.dtype) if isinstance(a, mx.array) else a
        for a, lead in zip(inputs, all_leads, strict=True)
    ]
    made = [
        _described((*inputs[o.like].shape[: o.kept], *o.tail), all_leads[o.like], o.dtype)
        for o in outputs
    ]
    _cpu.check(op, given, [*made, *(_described(s.shape, 1, s.dtype) for s in states)], ints, floats)


def _eager(
    op: str,
    inputs: Sequence[Any],
    leads: Sequence[int],
    outputs: Sequence[Output],
    states: Sequence[mx.array],
    ints: list[int],
    floats: list[float],
) -> list[mx.array]:
    all_leads = [*leads, *[-1] * (len(inputs) - len(leads))]
    given = [
        mx.contiguous(_joined(a, lead)) if isinstance(a, mx.array) else a
        for a, lead in zip(inputs, all_leads, strict=True)
    ]
    shapes = [(*inputs[o.like].shape[: o.kept], *o.tail) for o in outputs]
    made = [
        _joined(mx.zeros(shape, o.dtype), all_leads[o.like])
        for shape, o in zip(shapes, outputs, strict=True)
    ]
    new = [mx.contiguous(s * mx.array(1, s.dtype)) for s in states]
    arrays = [a for a in (*given, *made, *new) if isinstance(a, mx.array)]
    try:
        mx.eval(arrays)
    except ValueError as error:
        raise UnsupportedError(
            f"{op}: MLX arrays are computed eagerly on the CPU, not inside mx.compile or mx.vmap"
        ) from error
    _cpu.call(op, given, [*made, *new], ints, floats)
    results = [y.reshape(shape) for y, shape in zip(made, shapes, strict=True)]
    return _without_derivative(op, [a for a in inputs if isinstance(a, mx.array)], [*results, *new])


def _joined(a: mx.array, lead: int) -> mx.array:
    return a if lead < 0 else a.reshape(prod(a.shape[:lead]), *a.shape[lead:])


def _without_derivative(op: str, inputs: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
    """The outputs as functions of the inputs, whose derivative is refused."""

    def refuse(*_: Any) -> Any:
        raise UnsupportedError(f"{op}: has no derivative")

    function = mx.custom_function(lambda *_: outputs)
    function.vjp(refuse)
    function.jvp(refuse)
    return function(*inputs)


def integers(op: str, name: str, a: Any) -> mx.array:
    """The array as native ops take indices: i32 or i64."""
    if not isinstance(a, mx.array):
        a = mx.array(np.asarray(a))
    if not mx.issubdtype(a.dtype, mx.integer):
        raise ContractError(f"{op}: {name} is {str(a.dtype)[9:]}, needs integers")
    return a if a.dtype in (mx.int32, mx.int64) else a.astype(mx.int64)
