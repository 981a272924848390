"""`pytest tests/metal --device`: the tests of Metal kernels on a real device, not the simulator.

The claims about results are the same. What only the simulator sees (bytes, races, memory of a
threadgroup) is taken as said: an `Unseen` agrees with every comparison. Variants of arithmetic and
order are whatever the device does. Launches are counted as MLX gets them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import pytest
from simt import metal


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
_real = mx.fast.metal_kernel


def _metal_kernel(name: str, *args: Any, **options: Any) -> Any:
    """MLX's own, its launches counted; MLX names a kernel's function custom_kernel_<name>."""
    kernel = _real(name, *args, **options)
    source = options.get("header", "") + options.get("source", "")

    def call(*given: Any, grid: Any, threadgroup: Any, **rest: Any) -> Any:
        for log in _logs[-1:]:
            log.append(Launch(f"custom_kernel_{name}", source, tuple(grid), tuple(threadgroup)))
        return kernel(*given, grid=grid, threadgroup=threadgroup, **rest)

    return call


@contextlib.contextmanager
def installed(**_: Any) -> Iterator[list[Launch]]:
    """`simt.metal.installed` with nothing to install; options of the simulator have no meaning."""
    _logs.append([])
    try:
        yield _logs[-1]
        mx.synchronize()
    finally:
        _logs.pop()


def _no_torch(**_: Any) -> None:
    pytest.skip("torch's Metal device is not tested here")


def use() -> None:
    """Puts the device in the simulator's place.

    Raises:
        pytest.UsageError: MLX has no Metal device.
    """
    if not mx.metal.is_available() or mx.default_device() != mx.gpu:
        raise pytest.UsageError("--device: MLX computes on no Metal device here")
    mx.fast.metal_kernel = _metal_kernel
    metal.installed, metal.mps_installed = installed, _no_torch
    metal.missing = lambda: None
