"""A stand-in for `mx.fast.metal_kernel` that runs the generated text in the simulator."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from . import mxtext, session
from .msl import MLX_PREAMBLE, mlx_include

#: What mlx-lm asks a Metal device.
DEVICE_INFO = {
    "architecture": "simulator",
    "device_name": "simulator",
    "max_buffer_length": 1 << 35,
    "max_recommended_working_set_size": 1 << 36,
    "memory_size": 1 << 36,
}
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


def to_numpy(a: mx.array) -> np.ndarray:
    """A row-contiguous copy; bfloat16 as its bits. Always at least one dimension."""
    bits = a.view(mx.uint16) if a.dtype == mx.bfloat16 else a
    return np.array(bits, copy=True, order="C", ndmin=1)


def from_numpy(a: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """The array whose bytes `a` has."""
    return mx.array(a).view(dtype) if dtype == mx.bfloat16 else mx.array(a)


def _input(a: mx.array, contiguous: bool) -> tuple[np.ndarray, list[int]]:
    """An input's memory and its strides in elements."""
    if contiguous or not a.size:
        return to_numpy(a), [int(np.prod(a.shape[i + 1 :], dtype=int)) for i in range(a.ndim)]
    view = np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a, copy=False)
    strides = [s // view.itemsize for s in view.strides]
    extent = 1 + sum((n - 1) * s for n, s in zip(view.shape, strides, strict=True))
    memory = np.lib.stride_tricks.as_strided(view, (extent,), (view.itemsize,))
    return memory.copy(), strides


def _shape_buffers(a: mx.array, strides: list[int], wanted: tuple[bool, ...]) -> list[np.ndarray]:
    """The `_shape`, `_strides` and `_ndim` parameters of an input."""
    rank = np.array([a.ndim], np.int32)
    values = (np.array(a.shape, np.int32), np.array(strides, np.int64), rank)
    return [v for v, w in zip(values, wanted, strict=True) if w]


def _output(shape, dtype: mx.Dtype, init_value) -> np.ndarray:
    if init_value is None:
        return np.zeros(shape, _NUMPY[dtype])
    return to_numpy(mx.full(shape, init_value, dtype=dtype))


def _check_sizes(inputs, input_names, output_names, output_shapes, output_dtypes) -> None:
    """MLX's own errors."""
    for what, given, names in (
        ("inputs", inputs, input_names),
        ("output_shapes", output_shapes, output_names),
        ("output_dtypes", output_dtypes, output_names),
    ):
        if len(given) != len(names):
            raise ValueError(
                f"[metal_kernel] Expected `{what}` to have size {len(names)} "
                f"but got size {len(given)}."
            )


def metal_kernel(
    name,
    input_names,
    output_names,
    source,
    header="",
    ensure_row_contiguous=True,
    atomic_outputs=False,
    compile_options=None,
):
    """`mx.fast.metal_kernel` with the same signature; launches go to the log of `installed`."""
    if not output_names:
        raise ValueError("[metal_kernel] Must specify at least one output.")

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
    ):
        _check_sizes(inputs, input_names, output_names, output_shapes, output_dtypes)
        arrays = [a if isinstance(a, mx.array) else mx.array(a) for a in inputs]
        body = (name, input_names, output_names, source, header)
        text = mxtext.generate(*body, arrays, output_dtypes, template or [], atomic_outputs)
        if verbose:
            print(f"Generated source code for `{name}`:\n```\n{text.source}\n```")
        buffers = []
        for a, wanted in zip(arrays, text.shape_parameters, strict=True):
            memory, strides = _input(a, ensure_row_contiguous)
            buffers += [memory, *_shape_buffers(a, strides, wanted)]
        first = len(buffers)
        results = list(zip(output_shapes, output_dtypes, strict=True))
        buffers += [_output(shape, dtype, init_value) for shape, dtype in results]
        fresh = range(first, len(buffers)) if init_value is None else ()
        include = mlx_include()
        if include is None:
            raise RuntimeError("the installed mlx has no Metal headers")
        sizes = (tuple(grid), tuple(threadgroup))
        session.run(text.name, text.source, buffers, fresh, *sizes, [include], MLX_PREAMBLE)
        written = zip(buffers[first:], results, strict=True)
        return [from_numpy(b.reshape(shape), dtype) for b, (shape, dtype) in written]

    return call


@contextlib.contextmanager
def installed(**options) -> Iterator[list[session.Launch]]:
    """Inside, MLX has a Metal device: the simulator. Yields the log of launches.

    check: find races, bounds, uninitialised reads, divergence (slower), count bytes.
    transactions: count memory lines too (slower still; needs check).
    findings: "raise" CheckError after the launch, or "keep" them in the log.
    threadgroup_limit, max_threads: bytes and threads a threadgroup may have.
    ftz: flush denormals. contract: a * b + c may round once. ulp: error of exp, log, rsqrt and the
    like. order of simd_sum and the like: butterfly, sequential, reversed. schedule of threads:
    ascending, descending, random. seed: of the random schedule and the errors.
    """
    with session.opened(**options) as log, has_gpu(mx.metal, metal_kernel):
        yield log


@contextlib.contextmanager
def has_gpu(backend, kernel) -> Iterator[None]:
    """Inside, MLX has a GPU of a backend (mx.metal, mx.cuda), `kernel` makes its kernels, and
    mx.compile is off."""
    replaced = {
        (mx.fast, kernel.__name__): kernel,
        (mx.metal, "is_available"): lambda: backend is mx.metal,
        (mx.cuda, "is_available"): lambda: backend is mx.cuda,
        (mx, "default_device"): lambda: mx.Device(mx.gpu, 0),
        (mx, "device_info"): lambda *_: dict(DEVICE_INFO),
    }
    for name in ("stream", "default_stream", "new_stream", "new_thread_local_stream"):
        replaced[mx, name] = _of_the_cpu(getattr(mx, name))
    old = {place: getattr(*place) for place in replaced}
    with _eager():
        for (module, name), value in replaced.items():
            setattr(module, name, value)
        try:
            yield
        finally:
            for (module, name), value in old.items():
                setattr(module, name, value)


def _of_the_cpu(function):
    """`function` of a device or stream, the CPU's where code asks for the GPU's, which none has."""

    @functools.wraps(function)
    def call(where):
        gpu = isinstance(where, (mx.Device, mx.DeviceType)) and where == mx.gpu
        return function(mx.Device(mx.cpu, 0) if gpu else where)

    return call


_eager_blocks = 0


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """mx.compile is off inside: a simulated launch needs the values of its inputs."""
    global _eager_blocks
    _eager_blocks += 1
    mx.disable_compile()
    try:
        yield
    finally:
        _eager_blocks -= 1
        if not _eager_blocks:
            mx.enable_compile()
