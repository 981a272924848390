"""What nvcc makes of cuda/*.cu: registers, stack and shared memory of every kernel.

    python .ci/cuda_kernels.py [--out FILE] [ARCHITECTURE ...]

Compiles for the architectures of a release (or those given, 90a) with the nvcc of NVIDIA's PyPI
packages, else the one on the PATH, and writes a table.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "cuda").glob("*.cu"))
#: The ones with machine code in csrc/cuda.cmake.
RELEASE = ("80", "86", "89", "90a", "100", "120")
FLAGS = ("-std=c++17", "-O3", "-Xptxas", "-v")


class Kernel(NamedTuple):
    """A kernel as ptxas reports it, the functions it calls included; sizes in bytes."""

    name: str
    architecture: str
    registers: int
    stack: int
    spilled: int
    shared: int


def nvcc() -> Path | None:
    """The compiler."""
    try:
        import nvidia.cu13
    except ImportError:
        folders = []
    else:
        folders = [Path(p) / "bin" / "nvcc" for p in nvidia.cu13.__path__]
    found = [p for p in folders if p.exists()]
    other = shutil.which("nvcc")
    return found[0] if found else Path(other) if other else None


def kernel_name(mangled: str) -> str:
    """The C++ text of K in the mangled name of ``hm::kernel<hm::K>(hm::Arguments)``."""
    m = re.match(r"_ZN2hm6kernelINS_(\d+)(\w+)EEvNS_9ArgumentsE$", mangled)
    if not m:
        raise ValueError(f"not a kernel of cuda/launch.cuh: {mangled}")
    length = int(m[1])
    name, rest = m[2][:length], m[2][length:]
    constants = [f"{'-' * bool(n)}{v}" for n, v in re.findall(r"Li(n?)(\d+)E", rest)]
    return f"{name}<{', '.join(constants)}>" if constants else name


def parse(log: str) -> Iterator[Kernel]:
    """The kernels in what ``-Xptxas -v`` prints."""
    for part in log.split("Compiling entry function '")[1:]:
        mangled, architecture = re.match(r"(\w+)' for 'sm_(\w+)'", part).groups()
        stack = re.findall(r"(\d+) bytes (?:stack frame|cumulative stack size)", part)
        spilled = re.findall(r"(\d+) bytes spill", part)
        shared = re.search(r"(\d+) bytes smem", part)
        yield Kernel(
            kernel_name(mangled), architecture, int(re.search(r"Used (\d+) registers", part)[1]),
            max(map(int, stack)), sum(map(int, spilled)), int(shared[1]) if shared else 0,
        )  # fmt: skip


def compile_one(compiler: Path, file: Path, architecture: str) -> tuple[list[Kernel], float]:
    """The kernels of a file and the seconds it took."""
    # as csrc/cuda.cmake says
    virtual = "90" if architecture in ("100", "120") else architecture
    target = f"-gencode=arch=compute_{virtual},code=sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        before = time.monotonic()
        done = subprocess.run(
            [compiler, *FLAGS, target, "-cubin", file, "-o", Path(folder) / "cubin"],
            capture_output=True,
            text=True,
        )
        seconds = time.monotonic() - before
    if done.returncode:
        raise SystemExit(f"{file.name} for sm_{architecture}:\n{done.stderr}")
    return list(parse(done.stderr + done.stdout)), seconds


def table(architectures: tuple[str, ...], compiler: Path) -> Iterator[str]:
    """The lines of the report."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    yield f"nvcc {re.search(r'release .*', version.stdout)[0]}, -O3; registers of a thread"
    yield "(s: bytes of stack, p: bytes spilled, m: bytes of static shared memory, where not 0)"
    yield ""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {
            file: [pool.submit(compile_one, compiler, file, a) for a in architectures]
            for file in FILES
        }
        yield f"{'kernel':48}" + "".join(f"{'sm_' + a:>18}" for a in architectures)
        for file, running in jobs.items():
            done = [job.result() for job in running]
            times = "".join(f"{seconds:16.1f} s" for _, seconds in done)
            yield f"{file.name:48}{times}"
            by_name = [{k.name: k for k in kernels} for kernels, _ in done]
            for name in sorted(by_name[0], key=_natural):
                yield f"  {name:46}" + "".join(f"{_cell(k[name]):>18}" for k in by_name)


def _cell(kernel: Kernel) -> str:
    extra = [(kernel.stack, "s"), (kernel.spilled, "p"), (kernel.shared, "m")]
    return " ".join([str(kernel.registers), *(f"{n}{letter}" for n, letter in extra if n)])


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("architectures", nargs="*", default=RELEASE)
    arguments = parser.parse_args()
    compiler = nvcc() or sys.exit("no nvcc: pip install '.[test]', or put one on the PATH")
    lines = []
    for line in table(tuple(arguments.architectures), compiler):
        print(line, flush=True)
        lines.append(line.rstrip())
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
