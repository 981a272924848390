"""The instruction set and the threads native code uses; Python's garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from . import _cpu
from .errors import ContractError


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


@contextmanager
def no_collection() -> Iterator[None]:
    """Describing 10^5 tensors makes objects faster than the garbage collector can look through
    them for nothing: it would take half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
