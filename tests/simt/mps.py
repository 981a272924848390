"""A stand-in for `torch.mps.compile_shader` that runs its kernels in the simulator.

Arguments are bound as PyTorch binds them (torch/csrc/mps/Module.cpp): a tensor as its memory from
its first element on, a float as float32, an int as int64 unless `arg_casts` says otherwise, a list
of numbers as an array of those.
"""

from __future__ import annotations

import contextlib
import ctypes as C
from collections.abc import Iterator

import numpy as np
import torch

from . import session
from .msl import preprocess
from .rewrite import rewrite

_CASTS = {
    "fp16": np.float16,
    "bf16": None,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
}


def _numbers(values: list, cast: str | None) -> np.ndarray:
    """Numbers as a kernel's constant memory has them."""
    if cast is None:
        return np.array(values, np.int64 if isinstance(values[0], int) else np.float32)
    if cast not in _CASTS:
        raise RuntimeError(f"Unsupported cast instruction {cast}")
    if cast == "bf16":
        return torch.tensor(values, dtype=torch.bfloat16).view(torch.int16).numpy()
    return np.array(values).astype(_CASTS[cast])


def _memory(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's own memory, first to last element, as integers of its element size."""
    if tensor.device.type != "cpu":
        raise ValueError("the simulator takes CPU tensors")
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    extent = 1 + sum((n - 1) * s for n, s in steps) if tensor.numel() else 0
    size = tensor.element_size()
    kind = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[size]
    raw = (C.c_uint8 * (extent * size)).from_address(tensor.data_ptr() if extent else id(tensor))
    return np.frombuffer(raw, kind)


def _size(value) -> tuple[int, ...] | None:
    if value is None or isinstance(value, int):
        return None if value is None else (value,)
    size = tuple(value)
    if not 0 < len(size) < 4:
        raise RuntimeError("a size has one to three numbers")
    return size


class ShaderKernel:
    """What `lib.name` is: call it with the kernel's arguments in order."""

    def __init__(self, source: str, name: str):
        self.source, self.name = source, name

    @property
    def max_threads_per_threadgroup(self) -> int:
        return session.MAX_THREADS

    @property
    def thread_execution_width(self) -> int:
        return 32

    def __call__(self, *args, threads=None, group_size=None, arg_casts=None) -> None:
        """Runs the kernel. threads: of the whole grid, by default the first tensor's size.

        arg_casts: "fp16", "bf16", "int32", "int16", "int8", "uint8" for every number, or a dict
        from argument number to one of these.
        """
        threads, group = _size(threads), _size(group_size)
        casts = arg_casts if isinstance(arg_casts, dict) else {}
        default = arg_casts if isinstance(arg_casts, str) else None
        buffers = []
        for i, value in enumerate(args):
            if isinstance(value, torch.Tensor):
                buffers.append(_memory(value))
                threads = threads or (value.numel(),)
                continue
            values = list(value) if isinstance(value, (list, tuple)) else [value]
            if not values or not isinstance(values[0], (int, float)):
                raise RuntimeError(f"argument {i}: Unsupported argument type")
            buffers.append(_numbers(values, casts.get(i, default)))
        if threads is None:
            raise RuntimeError("Number of threads is undefined or has wrong dimension")
        group = group or (min(threads[0], session.MAX_THREADS),) + (1,) * (len(threads) - 1)
        if len(group) != len(threads):
            raise RuntimeError("threads and group_size differ in length")
        grid, group = (size + (1,) * (3 - len(size)) for size in (threads, group))
        session.run(self.name, self.source, buffers, (), grid, group)


class ShaderLibrary:
    """What `torch.mps.compile_shader` returns: an attribute per kernel of the source."""

    def __init__(self, source: str):
        self._source = source
        unit = rewrite(preprocess(source))
        self._names = [*unit.instances, *unit.kernels]

    def __getattr__(self, name: str) -> ShaderKernel:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._names:
            raise RuntimeError(f"Failed to create function state object for: {name}")
        return ShaderKernel(self._source, name)

    def __dir__(self) -> list[str]:
        return self._names


@contextlib.contextmanager
def mps_installed(**options) -> Iterator[list[session.Launch]]:
    """Inside, `torch.mps.compile_shader` is the simulator's. Options and log as in `installed`."""
    old = torch.mps.compile_shader
    with session.opened(**options) as log:
        torch.mps.compile_shader = ShaderLibrary
        try:
            yield log
        finally:
            torch.mps.compile_shader = old
