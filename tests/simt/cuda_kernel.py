"""Compiles a CUDA source for this machine and runs its kernels on numpy arrays."""

from __future__ import annotations

import ctypes as C
import platform
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from . import core, toolchain
from .cuda_rewrite import rewrite, with_includes
from .memory import DeviceMemory
from .msl import explain

INCLUDE = toolchain.HERE / "include" / "cuda"
SOURCE_NAME = "kernel.cu"
MAX_PARAMETERS = 64
SHARED_LIMIT = 227 * 1024  # a block on sm_90, when it asks for it
STATIC_LIMIT = 48 * 1024  # of what it declares itself

FLAGS = [
    *("-std=c++17", "-fPIC", "-g1", "-fno-strict-aliasing", "-I", str(INCLUDE)),
    # nvcc joins a * b + c by default.
    *("-w", "-Wreturn-type", "-ffp-contract=fast"),
    *(["-march=x86-64-v3"] if platform.machine() == "x86_64" else []),
]
# Most kernels compile for longer than they run: -O2 takes twice as long and makes nothing faster.
# Without expensive optimizations no products would join sums.
FAST = ["-O1", "-fexpensive-optimizations"]
# The callbacks are the engine's: no sanitizer library is linked. Vectorised loops would make
# accesses too wide for them.
CHECKED = [
    *("-O1", "-fno-tree-vectorize", "-fno-tree-slp-vectorize", "-fsanitize=thread"),
    # A misaligned float4 shows here: the compiler may take it apart before it is an access.
    "-fsanitize=bounds,shift,integer-divide-by-zero,alignment",
]


class _Parameter(C.Structure):
    """Parameter of include/cuda/simt_cuda/call.h."""

    _fields_ = (
        ("kind", C.c_char), ("size", C.c_uint32), ("item", C.c_char), ("item_size", C.c_uint32)
    )  # fmt: skip


@cache
def runtime() -> None:
    """Loads what only CUDA kernels need (PTX, asynchronous copies, fragments) for all of them."""
    core.engine()
    folder = toolchain.HERE / "engine"
    names = ["cuda_rt.cpp", *sorted(path.name for path in folder.glob("ptx*"))]
    text = [(folder / name).read_text() for name in names]
    sources = [str(folder / name) for name in names if name.endswith(".cpp")]
    command = [*toolchain.cxx(), "-std=c++17", "-O2", "-g1", "-fPIC", "-shared", *sources]
    command.append("-fvisibility=hidden")  # a kernel's own copies of inline functions are checked

    def make(path: Path) -> None:
        done = toolchain.run([*command, "-o", str(path)])
        if done.returncode:
            raise toolchain.CompileError("the CUDA runtime does not compile:\n" + done.stderr)

    C.CDLL(str(toolchain.cached([*text, own_version(), *command], make)), mode=C.RTLD_GLOBAL)


@cache
def own_version() -> str:
    """Changes when a header or the rewriter does."""
    here = toolchain.HERE
    files = [here / "cuda_rewrite.py", here / "tokens.py", here / "include/simt/abi.h"]
    files += sorted(p for p in INCLUDE.rglob("*") if p.is_file())
    return toolchain.digest([p.read_text() for p in files])


def translation_unit(source: str, expression: str, folders: Sequence[Path]) -> str:
    """C++ whose `simt_body` calls the kernel ``expression`` with the addresses of arguments."""
    return (
        '#include "cuda_runtime.h"\n'
        + rewrite(with_includes(source, SOURCE_NAME, list(folders)))
        + '\n#line 1 "simt_thunk"\nextern "C" int simt_parameters(simt_cuda::Parameter* out, int n)'
        + f" {{ return simt_cuda::describe({expression}, out, n); }}\n"
        + f'extern "C" void simt_body(void** a) {{ simt_cuda::call({expression}, a); }}\n'
    )


def compile_kernel(
    source: str,
    expression: str,
    includes: Iterable[str | Path] = (),
    defines: Iterable[str] = (),
    check: bool = False,
    contract: bool = True,
) -> Kernel:
    """The __global__ function ``expression`` (a name or a template-id) of ``source``.

    ``includes`` are folders of the source's own headers; ``contract`` lets a * b + c round once.
    Raises CompileError with the lines at fault. Compiled once per content, kept on disk.
    """
    runtime()
    folders = [Path(folder) for folder in includes]
    text = translation_unit(source, expression, folders)
    flags = [*FLAGS, *(CHECKED if check else FAST), *(f"-D{d}" for d in defines)]
    flags += [f"-I{folder}" for folder in folders] + ([] if contract else ["-ffp-contract=off"])
    compiler = list(toolchain.cxx())

    def make(path: Path) -> None:
        unit, part = path.with_suffix(".cpp"), path.with_suffix(".o")
        unit.write_text(text)
        done = toolchain.run([*compiler, *flags, "-c", str(unit), "-o", str(part)])
        if done.returncode:
            raise toolchain.CompileError(
                "the kernel does not compile:\n" + explain(done.stderr, source)
            )
        done = toolchain.run([*compiler, "-shared", str(part), "-o", str(path)])
        if done.returncode:
            raise toolchain.CompileError("the kernel does not link:\n" + done.stderr)
        unit.unlink()
        part.unlink()

    return Kernel(
        expression,
        str(toolchain.cached([text, own_version(), *flags, *compiler], make)),
        check,
        source,
    )


class Kernel:
    """A compiled kernel; call it with its arguments."""

    def __init__(self, name: str, path: str, checked: bool, source: str):
        self.name, self.path, self.checked, self.source = name, path, checked, source
        self._library = C.CDLL(path, mode=C.RTLD_LOCAL)
        self._body = C.cast(self._library.simt_body, C.c_void_p).value
        described = (_Parameter * MAX_PARAMETERS)()
        count = self._library.simt_parameters(described, MAX_PARAMETERS)
        if count > MAX_PARAMETERS:
            raise ValueError(f"{name}: {count} parameters, {MAX_PARAMETERS} is the limit here")
        self.parameters = [(p.kind.decode(), p.size) for p in described[:count]]
        self.items = [(p.item.decode(), p.item_size) for p in described[:count]]

    def function(self, name: str) -> Callable[[], int]:
        """An ``extern "C"`` function of the source."""
        return getattr(self._library, name)

    def __call__(
        self,
        arguments: Sequence[np.ndarray | np.generic | float],
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int = 0,
        outputs: Iterable[int] = (),
        names: Sequence[str] = (),
        shared_limit: int = SHARED_LIMIT,
        **options,
    ) -> core.Result:
        """Runs `kernel<<<grid, block, shared>>>(arguments)`.

        An argument is a C-contiguous array for a pointer (copied back if it points to non-const),
        None for a null pointer, a number, or for a struct an array of its bytes. ``outputs``:
        positions of arrays that start undefined. ``names`` are for findings and traffic.
        ``options`` go to core.launch.
        """
        if len(arguments) != len(self.parameters):
            raise ValueError(
                f"{self.name}: {len(arguments)} arguments, it has {len(self.parameters)} parameters"
            )
        if int(np.prod(block)) > 1024:
            raise ValueError(f"{self.name}: {int(np.prod(block))} threads a block, limit 1024")
        names = list(names) or [f"argument {i}" for i in range(len(arguments))]
        values, regions, written, fresh = [], [], [], set(outputs)
        with DeviceMemory(soft=self.checked) as memory:
            for i, (argument, (kind, size)) in enumerate(
                zip(arguments, self.parameters, strict=True)
            ):
                if kind not in "pc":
                    values.append(self._value(i, argument, kind, size))
                    continue
                if argument is None:
                    values.append(C.c_uint64(0))
                    continue
                array = self._array(i, argument)
                address = memory.alloc(max(array.nbytes, 1)) if i in fresh else memory.put(array)
                values.append(C.c_uint64(address))
                granule = min(array.itemsize, 4)
                facts = (address, array.nbytes, names[i], kind == "c", granule, i not in fresh)
                regions.append(core.Region(*facts))
                if kind == "p":
                    written.append((address, array))
            pointers = (C.c_void_p * max(1, len(values)))(*(C.addressof(v) for v in values))
            result = core.launch(
                self.path,
                self._body,
                C.addressof(pointers),
                block,
                groups=grid,
                cuda=True,
                threadgroup_limit=shared_limit if shared else STATIC_LIMIT,
                dynamic=[shared],
                check=self.checked,
                regions=regions,
                source=self.source,
                **options,
            )
            for address, array in written:
                memory.get(address, array)
        return result

    def _array(self, i: int, argument) -> np.ndarray:
        if not isinstance(argument, np.ndarray) or not argument.flags.c_contiguous:
            raise ValueError(f"{self.name}: argument {i} is a pointer, needs a contiguous array")
        return argument

    def _value(self, i: int, argument, kind: str, size: int):
        """The bytes of an argument passed by value."""
        if isinstance(argument, np.ndarray):
            data = argument.tobytes()
        elif kind == "o":
            raise ValueError(f"{self.name}: argument {i} is a struct of {size} bytes, needs them")
        else:
            data = np.array(argument, f"{kind}{size}" if kind == "f" else "i8").tobytes()[:size]
        if len(data) != size:
            raise ValueError(f"{self.name}: argument {i} has {len(data)} bytes, needs {size}")
        return (C.c_char * size).from_buffer_copy(data)
