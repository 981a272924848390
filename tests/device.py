"""`pytest tests/metal --device`, `pytest tests/cuda --device`: tests of kernels on a real GPU.

The claims about results are the same. What only the simulator sees (bytes, races, memory of a
threadgroup) is taken as said: an `Unseen` agrees with every comparison. Variants of arithmetic and
order are whatever the device does. Launches are counted as MLX or torch gets them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch


class Unseen:
    """A number or a table of numbers that hardware keeps to itself."""

    def __getattr__(self, name: str) -> Unseen:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: Any) -> Unseen:
        return self

    def __iter__(self) -> Iterator[Unseen]:
        return iter(())

    def __bool__(self) -> bool:
        return False

    def _agree(self, other: Any) -> bool:
        return True

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _agree
    __hash__ = None

    def _same(self, *_: Any) -> Unseen:
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _same
    __truediv__ = __rtruediv__ = __call__ = _same


@dataclass
class Launch:
    """What is known of a launch on a device; the fields of the simulator's `Launch`."""

    name: str
    source: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    findings: Any = field(default_factory=Unseen)
    traffic: Any = field(default_factory=Unseen)
    threadgroup_bytes: Any = field(default_factory=Unseen)
    stats: Any = field(default_factory=Unseen)


_logs: list[list[Launch]] = []


@contextlib.contextmanager
def installed(**_: Any) -> Iterator[list[Launch]]:
    """`installed` of the simulator with nothing to install; its options have no meaning."""
    _logs.append([])
    try:
        yield _logs[-1]
        _synchronize()
    finally:
        _logs.pop()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return
    import mlx.core as mx

    mx.synchronize()


def _no_torch(**_: Any) -> None:
    pytest.skip("torch's Metal device is not tested here")


def use() -> None:
    """Puts the device in the simulator's place: an NVIDIA GPU for tests/cuda, else a Mac's.

    Raises:
        pytest.UsageError: there is neither.
    """
    if torch.cuda.is_available():
        _use_cuda()
    else:
        _use_metal()


def _use_metal() -> None:
    try:
        import mlx.core as mx
    except ImportError:
        raise pytest.UsageError("--device: torch has no CUDA device here, and no MLX") from None
    from simt import metal

    if not mx.metal.is_available() or mx.default_device() != mx.gpu:
        raise pytest.UsageError("--device: MLX computes on no Metal device here")
    real = mx.fast.metal_kernel

    def counted(name: str, *args: Any, **options: Any) -> Any:
        """MLX's own; it names a kernel's function custom_kernel_<name>."""
        kernel = real(name, *args, **options)
        source = options.get("header", "") + options.get("source", "")

        def call(*given: Any, grid: Any, threadgroup: Any, **rest: Any) -> Any:
            for log in _logs[-1:]:
                log.append(Launch(f"custom_kernel_{name}", source, tuple(grid), tuple(threadgroup)))
            return kernel(*given, grid=grid, threadgroup=threadgroup, **rest)

        return call

    mx.fast.metal_kernel = counted
    metal.installed, metal.mps_installed = installed, _no_torch
    metal.missing = lambda: None


def _use_cuda() -> None:
    from simt import cuda, cuda_launch

    from hadamoe import torch_cuda

    def run(launch: Any, arrays: Any) -> list[torch.Tensor]:
        """On copies of the tensors in the GPU's memory; outputs that were given are written."""
        there = {name: a.cuda() if isinstance(a, torch.Tensor) else a for name, a in arrays.items()}
        done = torch_cuda.run(launch, there)
        for log in _logs[-1:]:
            threads = (launch.threads, 1, 1)
            log.append(Launch(launch.name, launch.body, launch.groups, threads))
        results = []
        for out, result in zip(launch.outputs, done, strict=True):
            given = arrays.get(out.name)
            results.append(result.cpu() if given is None else given.copy_(result))
        return results

    cuda_launch.run = run
    cuda.installed, cuda.missing = installed, lambda: None
