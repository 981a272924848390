"""How fast this machine reads memory, and how near to that every kernel instance comes.

Reports only; nothing here passes or fails.
"""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from . import _cpu, ops
from .weight import Instance, Part, Weight

__all__ = ["Pool", "Row", "fastest", "instances", "machine", "plot", "read_bandwidth"]

#: Bytes of codes a measurement cycles through: several times the last-level cache of most machines.
POOL_BYTES = 512 << 20
#: (rows, columns) measured.
SHAPES = {"dense": (8192, 2048), "experts": (1024, 2048)}
_SCALE_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "e8m0": 1}
#: Group of an instance's scales in the formats that use it.
_GROUP = {"linear": 64, "linear_signed": 32, "e2m1": 32, "e2m1_gguf": 32, "codebook": 128}


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement of a kernel.

    Attributes:
        what: ``dense`` (one matrix) or ``experts`` (8 of a stack).
        gbytes: 1e9 bytes of codes, scales and biases read per second.
        fraction: of the read bandwidth of the same number of threads.
        flops_per_byte: two per weight, over the bytes that weight takes.
    """

    instance: str
    what: str
    rows: int
    columns: int
    threads: int
    gbytes: float
    fraction: float
    flops_per_byte: float


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, load, versions, command, date."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    versions = {"python": platform.python_version()}
    for name in ("hadamoe", "numpy", "torch", "transformers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": ops.threads(),
        "isa": ops.isa(),
        "load_average": [round(v, 2) for v in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "command": _command(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _command() -> str:
    """What was run, paths by their last name alone."""
    return shlex.join(["hadamoe", *(Path(a).name if "/" in a else a for a in sys.argv[1:])])


def fastest(call: Callable[[], object], budget: float) -> float:
    """Seconds of the fastest of at least five calls, ``budget`` seconds of them: neighbours only
    slow it."""
    call()
    times: list[float] = []
    while len(times) < 5 or sum(times) < budget:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def read_bandwidth(threads: int, nbytes: int = 1 << 30, budget: float = 0.5) -> float:
    """1e9 bytes per second that reading alone reaches, on memory larger than any cache."""
    buffer = np.ones(nbytes, np.uint8)
    block = 1 << 16
    sums = np.empty(-(-nbytes // block), np.uint64)
    before = ops.threads()
    ops.set_threads(threads)
    try:
        seconds = fastest(lambda: _cpu.call("read_bytes", [buffer], [sums], [block], []), budget)
    finally:
        ops.set_threads(before)
    return nbytes / seconds / 1e9


class Pool:
    """Matrices of an instance cut from one large random buffer, each from its own place."""

    def __init__(
        self, instance: Instance, rows: int, columns: int, pool_bytes: int, least: int = 1
    ) -> None:
        self.instance, self.rows, self.columns = instance, rows, columns
        blocks = columns // 32
        packed = instance.table == "e2m1_gguf"
        self.row_bytes = 17 * blocks if packed else columns * instance.bits // 8
        self.group = columns if instance == ("codebook", instance.bits, "f16") else None
        self.group = self.group or _GROUP.get(instance.table, columns)
        self.matrices = max(least, pool_bytes // (rows * self.row_bytes))
        rng = np.random.default_rng(0)
        self._codes = self._fill_codes(rng, self.matrices * rows * self.row_bytes)
        self._scale = None
        if instance.table not in ("plain", "e2m1_gguf"):
            self._scale = self._fill_scale((self.matrices * rows, columns // self.group))
        self._codebook = np.linspace(-1, 1, 2 ** min(4, instance.bits), dtype=np.float32)

    def _fill_codes(self, rng: np.random.Generator, size: int) -> np.ndarray:
        if self.instance.table == "plain":
            kind = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32}[self.instance.scale]
            block = rng.standard_normal(1 << 20, np.float32) * np.float32(0.02)
            if kind is np.uint16:
                block = (block.view(np.uint32) >> 16).astype(np.uint16)
            return np.resize(block.astype(kind, copy=False).view(np.uint8), size)
        block = rng.integers(0, 256, (1 << 20) + 17, np.uint8)
        if self.instance.table == "e2m1_gguf":
            block = block[: len(block) // 17 * 17]
            block[::17] = 120  # the block's exponent
        return np.resize(block, size)

    def _fill_scale(self, shape: tuple[int, int]) -> np.ndarray:
        value = np.float32(0.01)
        if self.instance.scale == "e8m0":
            return np.full(shape, 120, np.uint8)
        if self.instance.scale == "bf16":
            return np.full(shape, value.view(np.uint32) >> 16, np.uint16)
        return np.full(shape, value, np.float16 if self.instance.scale == "f16" else np.float32)

    def part(self, i: int) -> Part:
        """The i-th matrix."""
        at = slice(i * self.rows, (i + 1) * self.rows)
        codes = self._codes.reshape(-1, self.row_bytes)[at]
        scale = None if self._scale is None else self._scale[at]
        if scale is not None and scale.dtype == np.float16:
            scale = scale.view(np.uint16)
        bias = scale if self.instance.table == "linear" else None
        book = self._codebook if self.instance.table == "codebook" else None
        return Part(self.instance, self.rows, self.group, codes, scale, bias, book)


def _measure(
    instance: Instance,
    what: str,
    rows: int,
    columns: int,
    tokens: int,
    budget: float,
    pool_bytes: int,
) -> tuple[float, int]:
    """(seconds, bytes) of a pass over the pool: through one matrix after the other, or through 8
    experts of a stack after 8 others."""
    x = np.random.default_rng(1).standard_normal((tokens, columns), np.float32)
    if what != "experts":
        pool = Pool(instance, rows, columns, pool_bytes, least=2)
        dense = [ops.pack(Weight(columns, ((pool.part(i),),))) for i in range(pool.matrices)]
        seconds = fastest(lambda: [ops.qmatmul(x, w) for w in dense] and None, budget)
        return seconds, pool.part(0).nbytes * len(dense)
    pool = Pool(instance, rows, columns, pool_bytes, least=8)
    count = min(256, pool.matrices)
    stack = ops.pack(Weight(columns, tuple((pool.part(i),) for i in range(count))))
    picks = np.random.default_rng(2).permutation(count).astype(np.int32)
    picks = picks[: count // 8 * 8].reshape(-1, 1, 8)
    picks = np.repeat(picks, tokens, axis=1)
    seconds = fastest(lambda: [ops.qmatmul(x, stack, expert=e) for e in picks] and None, budget)
    return seconds, pool.part(0).nbytes * picks.size // tokens


def instances(
    bandwidth: float,
    *,
    only: list[Instance] | None = None,
    budget: float = 0.3,
    pool_bytes: int = POOL_BYTES,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    tokens: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measure every instance of this build: one token through one matrix, and through 8 experts.

    Args:
        bandwidth: 1e9 bytes/s of reading alone, at the current number of threads.
        only: the instances to measure; None for all.
        budget: seconds spent on each measurement.
        pool_bytes: bytes of codes a measurement cycles through.
        tokens: that go through each matrix together.
        shapes: (rows, columns) by what it is; ``experts`` is a stack of which 8 are read.
    """
    rows = []
    for instance in only or ops.instances():
        progress(str(instance))
        for what, (n, k) in shapes.items():
            seconds, nbytes = _measure(instance, what, n, k, tokens, budget, pool_bytes)
            rate = nbytes / seconds / 1e9
            per_weight = nbytes / (round(nbytes / _bytes_per_weight(instance)))
            rows.append(
                Row(
                    str(instance), what, n, k, ops.threads(), rate, rate / bandwidth, 2 / per_weight
                )
            )
    return rows


def _bytes_per_weight(instance: Instance) -> float:
    if instance.table == "plain":
        return instance.bits / 8
    if instance.table == "e2m1_gguf":
        return 17 / 32
    group = (
        2048 if (instance.table, instance.scale) == ("codebook", "f16") else _GROUP[instance.table]
    )
    scales = _SCALE_BYTES[instance.scale] * (2 if instance.table == "linear" else 1)
    return instance.bits / 8 + scales / group


def report(
    bandwidth: dict[int, float],
    rows: list[Row],
    model: dict[str, Any] | None,
    profile: Any = None,
    prefills: Sequence[Any] = (),
    contexts: Sequence[Any] = (),
) -> dict[str, Any]:
    """Everything measured, for JSON. Rates in 1e9 bytes/s and tokens/s."""
    return {
        "machine": machine(),
        "read_bandwidth": {str(t): round(v, 2) for t, v in bandwidth.items()},
        "instances": [asdict(r) for r in rows],
        "model": model,
        "profile": None if profile is None else asdict(profile),
        "prefill": [asdict(r) for r in prefills],
        "context": [asdict(r) for r in contexts],
    }


def plot(path: str | os.PathLike[str], bandwidth: float, rows: list[Row]) -> None:
    """A roofline: GFLOP/s of each instance over its flops per byte, under the memory roof (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6))
    x = np.array([0.4, 10.0])
    axes.loglog(x, x * bandwidth, "k-", lw=1, label=f"memory roof, {bandwidth:.1f} GB/s")
    for what, marker, label in (("dense", "o", "one matrix"), ("experts", "^", "8 experts")):
        chosen = [r for r in rows if r.what == what]
        if not chosen:
            continue
        points = [(r.flops_per_byte, r.gbytes * r.flops_per_byte) for r in chosen]
        axes.loglog(*zip(*points, strict=True), marker, ms=6, alpha=0.7, label=label)
        named: set[str] = set()  # scale dtypes of one table and width lie side by side: one name
        for r, point in zip(chosen, points, strict=True) if what == "dense" else ():
            name = r.instance.partition("/")[0]
            name = r.instance if name == "plain" else name
            if name not in named:
                named.add(name)
                axes.annotate(name, point, fontsize=7, xytext=(5, -9), textcoords="offset points")
    axes.set(xlabel="flops per byte read", ylabel="GFLOP/s, one token")
    axes.set_title(f"{machine()['cpu']}, {ops.threads()} threads, {ops.isa()}", fontsize=9)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
