"""A stand-in for `mx.fast.metal_kernel` that runs the generated text in the simulator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from . import core, mxtext
from .msl import compile_kernel, mlx_include

#: MLX puts its own header before every custom kernel.
PREAMBLE = '#include "mlx/backend/metal/kernels/utils.h"'
MAX_BUFFERS, MAX_THREADS = 31, 1024
_NUMPY = {
    mx.bool_: np.bool_,
    mx.uint8: np.uint8,
    mx.uint16: np.uint16,
    mx.uint32: np.uint32,
    mx.uint64: np.uint64,
    mx.int8: np.int8,
    mx.int16: np.int16,
    mx.int32: np.int32,
    mx.int64: np.int64,
    mx.float16: np.float16,
    mx.bfloat16: np.uint16,  # its bits
    mx.float32: np.float32,
    mx.complex64: np.complex64,
}


@dataclass(frozen=True)
class Options:
    """How launches run; see `installed`."""

    check: bool = False
    ftz: bool = True
    contract: bool = True
    order: str = "butterfly"
    schedule: str = "ascending"
    ulp: int = 0
    seed: int = 1
    transactions: bool = False
    threadgroup_limit: int = 32768
    max_threads: int = MAX_THREADS
    findings: str = "raise"


@dataclass(frozen=True)
class Launch:
    """One launch as it happened. traffic: buffer name -> (bytes read, bytes written)."""

    name: str
    source: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    findings: list[core.Finding]
    traffic: dict[str, core.Traffic]
    threadgroup_bytes: int
    stats: dict[str, int]


def to_numpy(a: mx.array) -> np.ndarray:
    """A row-contiguous copy; bfloat16 as its bits. Always at least one dimension."""
    bits = a.view(mx.uint16) if a.dtype == mx.bfloat16 else a
    return np.array(bits, copy=True, order="C", ndmin=1)


def from_numpy(a: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """The array whose bytes `a` has."""
    return mx.array(a).view(dtype) if dtype == mx.bfloat16 else mx.array(a)


def _shape_buffers(a: mx.array, wanted: tuple[bool, bool, bool]) -> list[np.ndarray]:
    """The `_shape`, `_strides` and `_ndim` parameters of an input."""
    strides = [int(np.prod(a.shape[i + 1 :], dtype=np.int64)) for i in range(a.ndim)]
    values = (
        np.array(a.shape, np.int32),
        np.array(strides, np.int64),
        np.array([a.ndim], np.int32),
    )
    return [v for v, w in zip(values, wanted, strict=True) if w]


#: Options and log of each `installed` block that is open: code keeps kernels for longer than one.
_open: list[tuple[Options, list[Launch]]] = []


def metal_kernel(
    name,
    input_names,
    output_names,
    source,
    header="",
    ensure_row_contiguous=True,
    atomic_outputs=False,
    **_,
):
    """`mx.fast.metal_kernel` with the same signature; launches go to the log of `installed`."""

    def call(
        *,
        inputs,
        output_shapes,
        output_dtypes,
        grid,
        threadgroup,
        template=None,
        init_value=None,
        verbose=False,
        stream=None,
        **_,
    ):
        options, log = _open[-1]
        arrays = [a if isinstance(a, mx.array) else mx.array(a) for a in inputs]
        text = mxtext.generate(
            name,
            input_names,
            output_names,
            source,
            header,
            arrays,
            output_dtypes,
            template or [],
            atomic_outputs,
        )
        if verbose:
            print(f"Generated source code for `{name}`:\n```\n{text.source}\n```")
        buffers = []
        for a, wanted in zip(arrays, text.shape_parameters, strict=True):
            buffers += [to_numpy(a), *_shape_buffers(a, wanted)]
        first = len(buffers)
        for shape, dtype in zip(output_shapes, output_dtypes, strict=True):
            if init_value is None:
                buffers.append(np.zeros(shape, _NUMPY[dtype]))
            else:
                buffers.append(to_numpy(mx.full(shape, init_value, dtype=dtype)))
        fresh = range(first, len(buffers)) if init_value is None else ()
        log.append(_run(options, text, buffers, fresh, tuple(grid), tuple(threadgroup)))
        if log[-1].findings and options.findings == "raise":
            raise core.CheckError(text.name, log[-1].findings)
        results = zip(buffers[first:], output_shapes, output_dtypes, strict=True)
        return [from_numpy(b.reshape(s), d) for b, s, d in results]

    return call


def _run(options, text, buffers, fresh, grid, threadgroup) -> Launch:
    if len(buffers) > MAX_BUFFERS:
        raise ValueError(f"{text.name}: {len(buffers)} buffers, Metal allows {MAX_BUFFERS}")
    threads = int(np.prod(threadgroup))
    if threads > options.max_threads:
        raise ValueError(f"{text.name}: {threads} threads a group, limit {options.max_threads}")
    include = mlx_include()
    if include is None:
        raise RuntimeError("the installed mlx has no Metal headers")
    kernel = compile_kernel(
        text.source, text.name, [include], (), options.check, options.contract, PREAMBLE
    )
    size = tuple(min(a, b) for a, b in zip(threadgroup, grid, strict=True))
    result = kernel(
        dict(enumerate(buffers)),
        size,
        grid,
        outputs=fresh,
        ftz=options.ftz,
        schedule=options.schedule,
        order=options.order,
        ulp=options.ulp,
        seed=options.seed,
        transactions=options.transactions,
        threadgroup_limit=options.threadgroup_limit,
    )
    return Launch(
        text.name,
        text.source,
        grid,
        size,
        result.findings,
        result.traffic,
        result.threadgroup_bytes,
        result.stats,
    )


@contextlib.contextmanager
def installed(**options) -> Iterator[list[Launch]]:
    """Inside, MLX has a Metal device: the simulator. Yields the log of launches.

    check: find races, bounds, uninitialised reads, divergence (slower). ftz: flush denormals.
    contract: a * b + c may round once. schedule: ascending, descending or random (seed). order of
    simd_sum: butterfly, sequential, reversed. ulp: error of exp, log, rsqrt and the like.
    threadgroup_limit: bytes a group may use. findings: "raise" CheckError, or "keep" them in the
    log.
    """
    log: list[Launch] = []
    old = mx.fast.metal_kernel, mx.metal.is_available, mx.default_device
    mx.fast.metal_kernel = metal_kernel
    mx.metal.is_available = lambda: True
    mx.default_device = lambda: mx.Device(mx.gpu, 0)
    _open.append((Options(**options), log))
    try:
        yield log
    finally:
        _open.pop()
        mx.fast.metal_kernel, mx.metal.is_available, mx.default_device = old
