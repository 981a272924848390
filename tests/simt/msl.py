"""Compiles a Metal source for this machine and runs its kernels on numpy arrays."""

from __future__ import annotations

import ctypes as C
import importlib.util
import json
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np

from . import core, toolchain
from .memory import DeviceMemory
from .places import Origins
from .rewrite import THREAD_METHOD, rewrite
from .toolchain import CompileError
from .unit import Param, Unit

INCLUDE = toolchain.HERE / "include"
STUBS = toolchain.HERE / "stubs" / "metal"
METAL_VERSION = 320
#: What a kernel's text is called in messages.
SOURCE_NAME = "kernel.metal"
THUNK_NAME = "simt_thunk"
#: MLX puts its own header before every custom kernel.
MLX_PREAMBLE = '#include "mlx/backend/metal/kernels/utils.h"'

LANGUAGE = [
    *("-x", "cl", "-cl-std=clc++2021", "-cl-no-stdinc"),
    # Metal has half and no double.
    *("-Xclang", "-cl-ext=-__opencl_c_fp64,-cl_khr_fp64,+cl_khr_fp16"),
    *("-Xclang", "-cl-single-precision-constant"),
    *("-Wall", "-Wno-unknown-attributes", "-Wno-unused", "-Wno-unknown-pragmas"),
    *("-Wno-pass-failed", "-Wno-duplicate-decl-specifier", "-Wno-unused-command-line-argument"),
    "-Wimplicit-float-conversion",  # refused() reads it
    *("-fno-caret-diagnostics", "-I", str(INCLUDE / "msl")),
    # Fused multiply-add in hardware: the rounding Apple's compiler asks for.
    *(["-march=x86-64-v3"] if platform.machine() == "x86_64" else []),
]
FAST = ["-O2"]
# The checker is these callbacks, supplied by the engine: no sanitizer library is linked. Vectorised
# loops would make accesses too wide for them.
CHECKED = [
    *("-O1", "-fno-vectorize", "-fno-slp-vectorize", "-fsanitize=thread"),
    *("-mllvm", "-tsan-instrument-func-entry-exit=0"),
    # x[i] += 1 is a read as well, which a race detector may leave out.
    *("-mllvm", "-tsan-instrument-read-before-write=1"),
    "-fsanitize=bounds,shift,integer-divide-by-zero,float-cast-overflow",
    "-fno-sanitize=shift-base",
]
_CONSTANT_TYPES = {
    "bool": C.c_uint8,
    "int": C.c_int32,
    "uint": C.c_uint32,
    "float": C.c_float,
    "short": C.c_int16,
    "ushort": C.c_uint16,
}


@cache
def mlx_include() -> Path | None:
    """The folder of MLX's Metal headers in the installed mlx, or None."""
    spec = importlib.util.find_spec("mlx")
    for folder in spec.submodule_search_locations if spec else ():
        if (Path(folder) / "include" / "mlx" / "backend" / "metal" / "kernels").is_dir():
            return Path(folder) / "include"
    return None


def preprocess(
    source: str,
    includes: Iterable[str | Path] = (),
    defines: Iterable[str] = (),
    preamble: str = "",
) -> str:
    """`preamble` and `source` with includes and macros expanded and line markers kept."""
    command = [
        *(toolchain.clang() or ()),
        *("-E", "-x", "c++", "-std=c++17", "-nostdinc", "-nostdinc++", "-I", str(STUBS)),
        *(f"-D__METAL_VERSION__={METAL_VERSION}", "-D__METAL__=1", "-D__METAL_MACOS__=1"),
        *("-U__SSE__", *(f"-I{folder}" for folder in includes), *(f"-D{d}" for d in defines), "-"),
    ]
    done = toolchain.run(command, f'{preamble}\n#line 1 "{SOURCE_NAME}"\n{source}')
    if done.returncode:
        raise CompileError("the preprocessor refuses this source:\n" + explain(done.stderr, source))
    return done.stdout


def explain(messages: str, source: str) -> str:
    """A compiler's errors, each followed by the source line it names and the file that is from."""
    origins = Origins(source)
    shown = []
    for message in messages.splitlines():
        if ": error:" not in message and ": note:" not in message:
            continue
        shown.append(message)
        place = re.match(r"kernel\.(?:metal|cu):(\d+):", message)
        if place:
            line = int(place[1])
            origin = origins.origin(line)
            text = f"{origin} | {origin.text}" if origin else f"{line} | {origins.text(line)}"
            shown.append(f"    {text}")
    return "\n".join(shown[:60]) or messages[:2000]


def refused(messages: str) -> str:
    """Those of clang's warnings that are errors in Metal: a float becomes a bfloat unasked."""
    start = rf"^{re.escape(SOURCE_NAME)}:\d+:\d+: "
    found = re.findall(rf"{start}warning: implicit conversion.* to '.*__bf16.*", messages, re.M)
    return "\n".join(m.replace("warning: ", "error: not in Metal: ") for m in found)


def argument(k: int, param: Param) -> str:
    """The C++ expression that is parameter k of a kernel."""
    if param.attribute == "threadgroup":
        return f"(simt::AnyPtr{{simt::simt_dyn_shared({int(param.argument or 0)})}})"
    if param.is_buffer:
        return f"simt::Any{'Ref' if '&' in param.text else 'Ptr'}{{a[{k}]}}"
    return f"simt::{param.attribute}()"


def translation_unit(unit: Unit, expression: str) -> tuple[str, list[Param]]:
    """OpenCL C++ text whose `simt_body` calls the kernel, and the kernel's parameters."""
    name = re.match(r"[\w:]+", expression)
    params = unit.kernels.get(name[0].split("::")[-1]) if name else None
    if params is None:
        known = ", ".join([*unit.instances, *unit.kernels]) or "none"
        raise CompileError(f"the source has no kernel {expression}; it has: {known}")
    arguments = ", ".join(argument(k, p) for k, p in enumerate(params))
    thunk = (
        f'\n#line 1 "{THUNK_NAME}"\nextern "C" void simt_body(void thread* ctx) {{ '
        f"const ulong thread* a = (const ulong thread*)ctx; (void)a; "
        f"{expression}({arguments}); }}\n"
    )
    return "#include <msl.h>\n" + unit.text + thunk, params


def _build(text: str, flags: Sequence[str], source: str, target: Path) -> None:
    """Compiles `text` to the shared library `target`."""
    unit, obj = target.with_suffix(".cl"), target.with_suffix(".o")
    errors = []
    # A method marked `thread` is one of private objects only; where it is also called on others,
    # the unmarked form serves both.
    for method in ("__private", ""):
        unit.write_text(text.replace(THREAD_METHOD, method + " "))
        command = [*(toolchain.clang() or ()), *flags, "-c", str(unit), "-o", str(obj)]
        done = toolchain.run(command)
        if not done.returncode:
            break
        errors.append(done.stderr)
    unit.unlink()
    if done.returncode:
        raise CompileError("the kernel does not compile:\n" + explain(errors[0], source))
    if refused(done.stderr):
        raise CompileError("the kernel does not compile:\n" + explain(refused(done.stderr), source))
    done = toolchain.run([*toolchain.link_command(), str(obj), "-o", str(target)])
    obj.unlink()
    if done.returncode:
        raise CompileError("the kernel does not link:\n" + done.stderr[:3000])


@cache
def _own_version() -> str:
    """Changes when the header, the rewriter or this file does."""
    names = ("rewrite.py", "tokens.py", "unit.py", "msl.py", "include/msl", "stubs")
    files = [
        p for n in names for p in sorted([toolchain.HERE / n, *(toolchain.HERE / n).rglob("*")])
    ]
    return toolchain.digest([p.read_text() for p in files if p.is_file()])


_loaded: dict[tuple, Kernel] = {}


def compile_kernel(
    source: str,
    name: str,
    includes: Sequence[str | Path] = (),
    defines: Sequence[str] = (),
    check: bool = False,
    contract: bool = True,
    preamble: str = "",
    extra: Sequence[str] = (),
) -> Kernel:
    """The kernel `name` of `source`: a name, a template-id, or a host_name the source gives.

    `check` compiles for the checker; `contract` lets a * b + c round once; `preamble` is text that
    comes first and has no part in line numbers. Compiled once per content, kept on disk. Raises
    CompileError with the lines of `source` at fault.
    """
    flags = [*LANGUAGE, *(CHECKED if check else FAST), "-fPIC", "-g1", *extra]
    flags.append(f"-ffp-contract={'on' if contract else 'off'}")
    key = (preamble, source, name, tuple(map(str, includes)), tuple(defines), tuple(flags))
    kernel = _loaded.get(key)
    if kernel is None:
        kernel = _loaded[key] = _load(source, name, includes, defines, flags, check, preamble)
    return kernel


def _load(source, name, includes, defines, flags, check, preamble) -> Kernel:
    core.engine()
    parts = [preamble, source, name, *defines, *flags, *(toolchain.clang() or ()), _own_version()]
    parts += [toolchain.fingerprint(str(folder)) for folder in includes]
    facts = toolchain.cache_folder() / (toolchain.digest(parts) + ".json")
    library = facts.with_suffix(".so")
    if not (facts.exists() and library.exists()):
        unit = rewrite(preprocess(source, includes, defines, preamble))
        text, params = translation_unit(unit, unit.instances.get(name, name))
        toolchain.cached(parts, lambda path: _build(text, flags, source, path))
        toolchain.cached(
            parts,
            lambda path: path.write_text(
                json.dumps({"params": [asdict(p) for p in params], "constants": unit.constants})
            ),
            ".json",
        )
    known = json.loads(facts.read_text())
    params = [Param(**p) for p in known["params"]]
    return Kernel(name, str(library), params, known["constants"], check, source)


class Kernel:
    """A compiled kernel; call it with its buffers."""

    def __init__(self, name, path, params, constants, checked, source=""):
        self.name, self.path, self.checked = name, path, checked
        self.source = source
        self.params: list[Param] = params
        self.constants: dict[str, tuple[str, str]] = constants
        self.library = C.CDLL(path, mode=C.RTLD_LOCAL)
        self.body = C.cast(self.library.simt_body, C.c_void_p).value

    def set_constant(self, name: str, value: float) -> None:
        """Sets the function constant `name`."""
        address = getattr(self.library, "simt_fc_" + name)
        address.restype = C.c_uint64
        _CONSTANT_TYPES[self.constants[name][1]].from_address(address()).value = value

    def slots(self) -> dict[int, int]:
        """buffer index -> parameter number; buffers without an index take the next free one."""
        fixed = {
            int(p.argument): k
            for k, p in enumerate(self.params)
            if p.attribute == "buffer" and (p.argument or "").isdigit()
        }
        free = (i for i in range(1000) if i not in fixed)
        return fixed | {next(free): k for k, p in enumerate(self.params) if p.attribute is None}

    def __call__(
        self,
        buffers: Mapping[int, np.ndarray],
        threadgroup: tuple[int, int, int],
        grid: tuple[int, int, int] | None = None,
        groups: tuple[int, int, int] | None = None,
        outputs: Iterable[int] = (),
        constants: Mapping[str, float] | None = None,
        **options,
    ) -> core.Result:
        """Runs the kernel; `buffers` maps buffer indices to C-contiguous arrays, written in place.

        `outputs` are indices whose content starts undefined (0xFF bytes, and a finding when read
        before written). `grid` counts threads, `groups` threadgroups. `options` go to core.launch.
        """
        for name, value in (constants or {}).items():
            self.set_constant(name, value)
        outputs = set(outputs)
        context = (C.c_uint64 * (len(self.params) + 8))()
        regions, placed = [], []
        with DeviceMemory(soft=self.checked) as memory:
            for index, k in self.slots().items():
                param, array = self.params[k], buffers.get(index)
                if array is None:
                    # Unused under a function constant, but the optimiser may load it anyway.
                    context[k] = memory.put(np.zeros(64, np.uint8))
                    continue
                if not array.flags.c_contiguous:
                    raise ValueError(f"{self.name}: {param.name} is not contiguous")
                place = self._same_memory(placed, param, array)
                if place is not None:
                    context[k] = place
                    continue
                fresh = index in outputs
                address = memory.alloc(max(array.nbytes, 1)) if fresh else memory.put(array)
                context[k] = address
                placed.append((param, array, address))
                granule = min(array.itemsize, 4)
                readonly = self._only_read(param, array, buffers)
                facts = (array.nbytes, param.name, readonly, granule, not fresh)
                regions.append(core.Region(address, *facts))
            result = core.launch(
                self.path,
                self.body,
                C.addressof(context),
                threadgroup,
                grid,
                groups,
                check=self.checked,
                regions=regions,
                source=self.source,
                **options,
            )
            for region, (_, array, address) in zip(regions, placed, strict=True):
                if not region.readonly:
                    memory.get(address, array)
        return result

    def _same_memory(self, placed, param, array) -> int | None:
        """The address of a buffer that is the same memory as `array`, which may be written."""
        for other, known, address in placed:
            if (param.readonly and other.readonly) or not np.may_share_memory(known, array):
                continue
            if known.ctypes.data != array.ctypes.data or known.nbytes != array.nbytes:
                raise ValueError(f"{self.name}: {other.name} and {param.name} overlap in part")
            return address
        return None

    def _only_read(self, param, array, buffers) -> bool:
        """Whether no parameter that may write has this memory."""
        slots = self.slots()
        writers = (i for i, k in slots.items() if not self.params[k].readonly and i in buffers)
        return param.readonly and not any(np.may_share_memory(buffers[i], array) for i in writers)
