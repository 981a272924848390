"""The engine from Python: one launch, its findings and its counts."""

from __future__ import annotations

import ctypes as C
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from . import toolchain
from .places import Origins

SCHEDULES = ("ascending", "descending", "random")
ORDERS = ("butterfly", "sequential", "reversed")
#: Places inside the simulator: a finding names the line of the user's kernel that called them.
OWN_PLACES = (str(toolchain.HERE / "include"), "simt_thunk")


_one_launch = threading.Lock()  # the engine's findings and buffers are global


class _U3(C.Structure):
    _fields_ = (("x", C.c_uint32), ("y", C.c_uint32), ("z", C.c_uint32))


class _Launch(C.Structure):
    """LaunchDesc of include/simt/abi.h."""

    _fields_ = (
        ("grid_threads", _U3),
        ("groups", _U3),
        ("tg", _U3),
        ("width", C.c_uint32),
        ("by_groups", C.c_uint32),
        ("cuda", C.c_uint32),
        ("shared_limit", C.c_uint64),
        ("dyn_bytes", C.c_uint64 * 8),
        ("ftz", C.c_uint32),
        ("sched", C.c_uint32),
        ("seed", C.c_uint64),
        ("nworkers", C.c_uint32),
        ("order", C.c_uint32),
        ("ulp", C.c_uint32),
        ("transactions", C.c_uint32),
        ("seconds", C.c_uint32),
    )


class _Stats(C.Structure):
    _fields_ = tuple(
        (n, C.c_uint64) for n in ("switches", "simd_ops", "barriers", "groups", "shared_bytes")
    )


class _Report(C.Structure):
    """Report of engine/reports.cpp."""

    _fields_ = (
        ("kind", C.c_char * 64),
        ("message", C.c_char * 512),
        ("file", C.c_char * 512),
        ("buffer", C.c_char * 64),
        ("pc", C.c_uint64),
        ("count", C.c_uint64),
        ("offset", C.c_int64),
        ("group", _U3),
        ("thread", _U3),
        ("line", C.c_uint32),
        ("simdgroup", C.c_uint32),
        ("lane", C.c_uint32),
        ("in_kernel", C.c_uint32),
    )


class _Traffic(C.Structure):
    """TrafficCounts of engine/checker.cpp; [0] reads, [1] writes."""

    _fields_ = (("bytes", C.c_uint64 * 2), ("unique", C.c_uint64 * 2), ("lines", C.c_uint64 * 2))


@dataclass(frozen=True)
class Region:
    """A buffer as the checker knows it."""

    address: int
    size: int
    name: str
    readonly: bool
    granule: int = 4
    initialised: bool = True


@dataclass(frozen=True)
class Finding:
    """One fault: what happened first at this source line, and how often it was seen.

    where: file:line of the kernel's text; origin: of the file in metal/ it was made from, or "";
    code: that line. buffer and offset (in bytes) are of the memory concerned; group, thread (in its
    group), simdgroup and lane of the thread that did it.
    """

    kind: str
    message: str
    where: str
    count: int
    code: str = ""
    buffer: str = ""
    offset: int = -1
    group: tuple[int, int, int] | None = None
    thread: tuple[int, int, int] | None = None
    simdgroup: int | None = None
    lane: int | None = None
    origin: str = ""

    def __str__(self) -> str:
        place = f"{self.origin} ({self.where})" if self.origin else self.where or "unknown place"
        text = f"[{self.kind}] {place}: {self.message}"
        if self.buffer:
            text += f"; {self.buffer} at byte {self.offset}" if self.offset >= 0 else ""
            text += f"; {self.buffer}" if self.offset < 0 else ""
        if self.thread is not None:
            text += f"; thread {self.thread} of group {self.group}"
            text += f", simdgroup {self.simdgroup} lane {self.lane}"
        text += f" (seen {self.count} times)" if self.count > 1 else ""
        return text + (f"\n      {self.code}" if self.code else "")


class CheckError(AssertionError):
    """A launch with findings; `.findings` lists them, `.kernel` names the kernel."""

    def __init__(self, kernel: str, findings: Sequence[Finding]):
        self.kernel, self.findings = kernel, list(findings)
        lines = "\n".join(f"  {f}" for f in findings)
        number = f"{len(findings)} finding" + ("s" if len(findings) > 1 else "")
        super().__init__(f"kernel {kernel}: {number}\n{lines}")


class Traffic(tuple):
    """(bytes read, bytes written) of a buffer, with more as attributes.

    read, written: bytes of all accesses. unique_read, unique_written: bytes touched at least once.
    lines_read, lines_written: 128-byte lines, counted once per simdgroup and instruction (0 unless
    transactions were asked for).
    """

    def __new__(cls, counts: _Traffic):
        self = super().__new__(cls, counts.bytes)
        self.read, self.written = counts.bytes
        self.unique_read, self.unique_written = counts.unique
        self.lines_read, self.lines_written = counts.lines
        return self


@dataclass(frozen=True)
class Result:
    """What one launch left: findings, counts of the engine, bytes per buffer (checker only)."""

    findings: list[Finding]
    stats: dict[str, int]
    traffic: dict[str, Traffic]
    threadgroup_bytes: int


@cache
def engine() -> C.CDLL:
    """The engine, compiled at first use and visible to every kernel."""
    names = ("callbacks", "checker", "group", "launch", "math", "reports", "switch")
    sources = [toolchain.HERE / "engine" / f"{name}.cpp" for name in names]
    headers = [toolchain.HERE / "engine" / "engine.h", toolchain.HERE / "include/simt/abi.h"]
    command = [*(toolchain.cxx() or ()), "-std=c++17", "-O2", "-g1", "-fPIC", "-shared"]

    def make(path):
        done = toolchain.run([*command, *map(str, sources), "-o", str(path), "-lpthread"])
        if done.returncode:
            raise toolchain.CompileError("the engine does not compile:\n" + done.stderr[:4000])

    path = toolchain.cached([p.read_text() for p in [*sources, *headers]] + command, make)
    lib = C.CDLL(str(path), mode=C.RTLD_GLOBAL)
    number, text = C.c_uint32, C.c_char_p
    lib.simt_launch.argtypes = [C.POINTER(_Launch), C.c_void_p, C.c_void_p]
    lib.simt_check_region.argtypes = [C.c_void_p, C.c_uint64, text, C.c_int, number, C.c_int]
    return lib


def _load_base(path: str) -> int | None:
    """Where the library `path` is loaded."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            if line.rstrip().endswith(path):
                return int(line.split("-")[0], 16) - int(line.split()[2], 16)
    return None


def source_lines(path: str, addresses: Sequence[int]) -> dict[int, str]:
    """file:line of instructions of the loaded kernel `path`; what is unknown keeps its address."""
    places = {address: hex(address) for address in addresses}
    base = _load_base(path) if places else None
    tool = shutil.which("addr2line")  # Debian: binutils
    if base is None or tool is None:
        return places
    command = [tool, "-a", "-i", "-e", path, *(hex(address - base - 1) for address in places)]
    answer = iter(subprocess.run(command, capture_output=True, text=True).stdout.split("\n0x"))
    for address, block in zip(places, answer, strict=True):
        for line in block.splitlines()[1:]:  # innermost inlined function first
            name = os.path.basename(re.sub(r" \(discriminator.*", "", line))
            if "?" not in name and not any(own in line for own in OWN_PLACES):
                places[address] = name
                break
    return places


def _findings(lib: C.CDLL, path: str, source: str) -> list[Finding]:
    reports = [_Report() for _ in range(lib.simt_n_reports())]
    for i, report in enumerate(reports):
        lib.simt_get_report(i, C.byref(report))
    places = source_lines(path, [r.pc for r in reports if not r.file and r.pc])
    found, origins = [], Origins(source)
    for r in reports:
        where = places.get(r.pc, "")
        if r.file:
            where = f"{os.path.basename(r.file.decode())}:{r.line}"
        line = re.fullmatch(r"kernel\.(?:metal|cu):(\d+)", where)
        code, who = origins.text(int(line[1])) if line else "", {}
        origin = origins.origin(int(line[1])) if line else None
        if origin:
            who["origin"], code = str(origin), origin.text
        if r.in_kernel:
            group, thread = ((v.x, v.y, v.z) for v in (r.group, r.thread))
            who |= {"group": group, "thread": thread, "simdgroup": r.simdgroup, "lane": r.lane}
        facts = (r.kind.decode(), r.message.decode(), where, r.count, code)
        found.append(Finding(*facts, r.buffer.decode(), r.offset, **who))
    return found


def launch(
    path: str,
    body: int,
    arguments: int,
    threadgroup: tuple[int, int, int],
    grid: tuple[int, int, int] | None = None,
    groups: tuple[int, int, int] | None = None,
    width: int = 32,
    cuda: bool = False,
    threadgroup_limit: int = 32768,
    dynamic: Sequence[int] = (),
    ftz: bool = False,
    schedule: str = "ascending",
    order: str = "butterfly",
    ulp: int = 0,
    seed: int = 1,
    workers: int = 1,
    check: bool = False,
    transactions: bool = False,
    seconds: int = 120,
    regions: Sequence[Region] = (),
    source: str = "",
) -> Result:
    """Runs `body(arguments)` once per thread of the grid.

    `grid` counts threads (Metal's dispatchThreads, edge groups are smaller), `groups` counts
    threadgroups; give one. `path` is the library `body` lies in, `source` its text, whose lines
    findings show. `order` is the order simd_sum adds in; `ulp` the error added to exp, log, rsqrt
    and the like; `transactions` counts memory lines (slow). After `seconds` of processor time a
    kernel is taken for endless.
    """
    lib = engine()
    desc = _Launch(tg=_U3(*threadgroup), width=width, cuda=cuda, shared_limit=threadgroup_limit)
    desc.ftz, desc.seed, desc.nworkers, desc.ulp = ftz, seed, workers, ulp
    desc.sched, desc.order = SCHEDULES.index(schedule), ORDERS.index(order)
    desc.transactions, desc.seconds = transactions, seconds
    if grid is not None:
        desc.grid_threads = _U3(*grid)
    else:
        desc.groups, desc.by_groups = _U3(*groups), 1
    for i, size in enumerate(dynamic):
        desc.dyn_bytes[i] = size
    with _one_launch:
        lib.simt_clear_reports()
        lib.simt_check_begin(int(check))
        for r in regions:
            name = r.name.encode()
            lib.simt_check_region(r.address, r.size, name, r.readonly, r.granule, r.initialised)
        lib.simt_launch(C.byref(desc), body, arguments)
        stats, counts, traffic = _Stats(), _Traffic(), {}
        lib.simt_get_stats(C.byref(stats))
        for i, r in enumerate(regions if check else ()):
            lib.simt_region_traffic(i, C.byref(counts))
            traffic[r.name] = Traffic(counts)
        found = _findings(lib, path, source)
        lib.simt_check_begin(0)
    names = ("switches", "simd_ops", "barriers", "groups")
    return Result(found, {n: getattr(stats, n) for n in names}, traffic, stats.shared_bytes)
