"""What the stand-ins share: how launches run, the log of launches, and one launch."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import core
from .msl import compile_kernel

MAX_BUFFERS, MAX_THREADS = 31, 1024  # of Metal
MAX_THREADGROUP_BYTES = 32768


@dataclass(frozen=True)
class Options:
    """How launches run; see `metal.installed`."""

    check: bool = False
    ftz: bool = True
    contract: bool = True
    order: str = "butterfly"
    schedule: str = "ascending"
    ulp: int = 0
    seed: int = 1
    transactions: bool = False
    threadgroup_limit: int = MAX_THREADGROUP_BYTES
    max_threads: int = MAX_THREADS
    findings: str = "raise"
    warpgroups: bool = False

    def __post_init__(self):
        for name, known in (
            ("order", core.ORDERS),
            ("schedule", core.SCHEDULES),
            ("findings", ("raise", "keep")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}; it is one of {', '.join(known)}")


@dataclass(frozen=True)
class Launch:
    """One launch as it happened. traffic: buffer name -> (bytes read, bytes written) and more."""

    name: str
    source: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    findings: list[core.Finding]
    traffic: dict[str, core.Traffic]
    threadgroup_bytes: int
    stats: dict[str, int]


#: The open sessions, innermost last: code keeps kernels for longer than one of them.
_open: list[tuple[Options, list[Launch]]] = []


@contextlib.contextmanager
def opened(**options) -> Iterator[list[Launch]]:
    """Launches inside run with these options and are logged in the list."""
    log: list[Launch] = []
    _open.append((Options(**options), log))
    try:
        yield log
    finally:
        _open.pop()


def current(name: str) -> tuple[Options, list[Launch]]:
    """The open session, in which kernel `name` runs."""
    if not _open:
        raise RuntimeError(f"{name} is a simulated kernel: it runs only inside installed()")
    return _open[-1]


def run(
    name: str,
    source: str,
    buffers: Sequence[np.ndarray],
    fresh: Collection[int],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    includes: Sequence[Path] = (),
    preamble: str = "",
) -> None:
    """One launch with the options of the open session; its findings are raised unless kept.

    `fresh` are the numbers of buffers whose content starts undefined.
    """
    options, log = current(name)
    if len(buffers) > MAX_BUFFERS:
        raise ValueError(f"{name}: {len(buffers)} buffers, Metal allows {MAX_BUFFERS}")
    for what, size in (("grid", grid), ("threadgroup", threadgroup)):
        if len(size) != 3 or min(size) < 1:
            raise ValueError(f"{name}: {what} is {size}, needs three positive numbers")
    threads = int(np.prod(threadgroup))
    if threads > options.max_threads:
        raise ValueError(f"{name}: {threads} threads a threadgroup, limit {options.max_threads}")
    kernel = compile_kernel(
        source, name, includes, (), options.check, options.contract, preamble=preamble
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
    facts = (result.findings, result.traffic, result.threadgroup_bytes, result.stats)
    log.append(Launch(name, source, grid, size, *facts))
    if result.findings and options.findings == "raise":
        raise core.CheckError(name, result.findings)


def variants(ulp: int = 4) -> Iterator[dict]:
    """Options for `metal.installed`, one dict for each freedom an Apple GPU has, then all together.

    What is required of a kernel must hold under every one.
    """
    freedoms = [
        {"ftz": False},
        {"contract": False},
        {"order": "sequential"},
        {"order": "reversed"},
        {"schedule": "descending"},
        {"schedule": "random", "seed": 7},
        {"ulp": ulp},
        {"ulp": ulp, "seed": 2},
    ]
    yield {}
    yield from freedoms
    both = {"ftz": False, "contract": False, "ulp": ulp, "seed": 3}
    yield {**both, "order": "sequential", "schedule": "random"}
