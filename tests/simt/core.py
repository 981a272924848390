"""The engine from Python: one launch, its findings and its counts."""

from __future__ import annotations

import ctypes as C
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from . import toolchain

SCHEDULES = ("ascending", "descending", "random")
ORDERS = ("butterfly", "sequential", "reversed")
#: Files of the simulator itself: a finding names the line of the user's kernel that called them.
OWN_FILES = ("msl.h", "cuda_emu.h", "simt_thunk")


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
    )


class _Stats(C.Structure):
    _fields_ = tuple((n, C.c_uint64) for n in ("switches", "colls", "bars", "groups", "shared"))


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
    """One fault: its kind, what happened, the source line and how often it was seen."""

    kind: str
    message: str
    where: str
    count: int

    def __str__(self) -> str:
        return f"[{self.kind}] {self.where}: {self.message} (x{self.count})"


class CheckError(AssertionError):
    """A launch with findings; `.findings` lists them."""

    def __init__(self, kernel: str, findings: Sequence[Finding]):
        self.findings = list(findings)
        lines = "\n".join(f"  {f}" for f in findings)
        super().__init__(f"kernel {kernel}: {len(self.findings)} findings\n{lines}")


class Traffic(tuple):
    """(bytes read, bytes written) of a buffer."""

    __slots__ = ()


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
    source = toolchain.HERE / "engine" / "simt_rt.cpp"
    header = toolchain.HERE / "include" / "simt" / "abi.h"
    command = [*(toolchain.cxx() or ()), "-std=c++17", "-O2", "-g1", "-fPIC", "-shared"]

    def make(path):
        done = toolchain.run([*command, str(source), "-o", str(path), "-lpthread"])
        if done.returncode:
            raise toolchain.CompileError("the engine does not compile:\n" + done.stderr[:4000])

    path = toolchain.cached([source.read_text(), header.read_text(), " ".join(command)], make)
    lib = C.CDLL(str(path), mode=C.RTLD_GLOBAL)
    number, text = C.c_uint32, C.c_char_p
    lib.simt_launch.argtypes = [C.POINTER(_Launch), C.c_void_p, C.c_void_p]
    lib.simt_check_region.argtypes = [C.c_void_p, C.c_uint64, text, C.c_int, number, C.c_int]
    big, small = C.POINTER(C.c_uint64), C.POINTER(number)
    lib.simt_get_report.argtypes = [C.c_int, text, text, text, small, big, big]
    return lib


def source_line(path: str, address: int) -> str:
    """file:line of an instruction of a loaded kernel; its address where that is not known."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            if line.rstrip().endswith(path):
                base = int(line.split("-")[0], 16) - int(line.split()[2], 16)
                break
        else:
            return hex(address)
    command = ["addr2line", "-i", "-e", path, hex(address - base - 1)]
    try:
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    except FileNotFoundError:  # Debian: binutils
        return hex(address)
    for line in lines:
        name = os.path.basename(re.sub(r" \(discriminator.*", "", line))
        if "?" not in name and not name.startswith(OWN_FILES):
            return name
    return hex(address)


def _findings(lib: C.CDLL, path: str) -> list[Finding]:
    kind, message, file = (C.create_string_buffer(512) for _ in range(3))
    line, address, count = C.c_uint32(), C.c_uint64(), C.c_uint64()
    out = []
    for i in range(lib.simt_n_reports()):
        lib.simt_get_report(i, kind, message, file, line, address, count)
        where = ""
        if file.value:
            where = f"{os.path.basename(file.value.decode())}:{line.value}"
        elif address.value:
            where = source_line(path, address.value)
        out.append(Finding(kind.value.decode(), message.value.decode(), where, count.value))
    return out


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
    regions: Sequence[Region] = (),
) -> Result:
    """Runs `body(arguments)` once per thread of the grid.

    `grid` counts threads (Metal's dispatchThreads, edge groups are smaller), `groups` counts
    threadgroups; give one. `path` is the library `body` lies in, for source lines. `order` is the
    order simd_sum adds in; `ulp` the error added to exp, log, rsqrt and the like.
    """
    lib = engine()
    desc = _Launch(tg=_U3(*threadgroup), width=width, cuda=cuda, shared_limit=threadgroup_limit)
    desc.ftz, desc.seed, desc.nworkers, desc.ulp = ftz, seed, workers, ulp
    desc.sched, desc.order = SCHEDULES.index(schedule), ORDERS.index(order)
    if grid is not None:
        desc.grid_threads = _U3(*grid)
    else:
        desc.groups, desc.by_groups = _U3(*groups), 1
    for i, size in enumerate(dynamic):
        desc.dyn_bytes[i] = size
    lib.simt_clear_reports()
    lib.simt_check_begin(int(check))
    if check:
        for r in regions:
            name = r.name.encode()
            lib.simt_check_region(r.address, r.size, name, r.readonly, r.granule, r.initialised)
    lib.simt_launch(C.byref(desc), body, arguments)
    stats = _Stats()
    lib.simt_get_stats(C.byref(stats))
    traffic = {}
    read, written = C.c_uint64(), C.c_uint64()
    for i, r in enumerate(regions if check else ()):
        lib.simt_region_traffic(i, C.byref(read), C.byref(written))
        traffic[r.name] = Traffic((read.value, written.value))
    found = _findings(lib, path)
    lib.simt_check_begin(0)
    names = {"switches": "switches", "colls": "simd_ops", "bars": "barriers", "groups": "groups"}
    counts = {new: getattr(stats, old) for old, new in names.items()}
    return Result(found, counts, traffic, stats.shared)
