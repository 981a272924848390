"""A stand-in for `mx.fast.cuda_kernel` that runs the generated text in the simulator.

The text is that of mlx/backend/cuda/custom_kernel.cpp in MLX 0.32.2. MLX prints it only where it
was built for CUDA, so no test here can ask MLX for it, as one can for Metal.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from . import core, mxtext, session
from .cuda_kernel import compile_kernel
from .mxfast import from_numpy, has_gpu, to_numpy

HEADER = """
#include "mlx/backend/cuda/device/utils.cuh"

#include <cooperative_groups.h>

"""
FREE_SHARED = 48 * 1024  # of a block that asks for no more
GRANTED = 48000  # dynamic shared memory above which MLX asks, when it first meets the kernel
MAX_DIMENSIONS = 10  # of a Shape or Strides parameter
TYPES = {
    mx.bool_: "bool",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
}
#: (suffix of the parameter, its type); there where the source says the name and the input has
#: dimensions.
EXTRAS = (("shape", "Shape"), ("strides", "Strides"), ("ndim", "int"))


def mangled(value: bool | int | mx.Dtype) -> str:
    """A template argument in a kernel's name."""
    if isinstance(value, bool):
        return "_t" if value else "_f"
    return f"_{value if isinstance(value, int) else mxtext.TYPES[value]}"


def constant(name: str, value: bool | int | mx.Dtype) -> str:
    """The line of the body that gives a template argument its name."""
    if isinstance(value, bool):
        return f"  constexpr bool {name} = {str(value).lower()};\n"
    if isinstance(value, int):
        return f"  constexpr int {name} = {value};\n"
    return f"  using {name} = {TYPES[value]};\n"


def wanted(source: str, name: str, array: mx.array) -> list[tuple[str, str]]:
    """The extra parameters of an input that its kernel's body names."""
    return [e for e in EXTRAS if array.ndim and f"{name}_{e[0]}" in source]


def generate(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str,
    inputs: Sequence[mx.array],
    output_dtypes: Sequence[mx.Dtype],
    template: Sequence[tuple[str, bool | int | mx.Dtype]],
) -> tuple[str, str]:
    """The kernel's name and its text."""
    kernel = f"custom_kernel_{name}" + "".join(mangled(value) for _, value in template)
    parameters = []
    for input_name, array in zip(input_names, inputs, strict=True):
        parameters.append(f"const {TYPES[array.dtype]}* {input_name}")
        for extra, type in wanted(source, input_name, array):
            parameters.append(f"const __grid_constant__ {type} {input_name}_{extra}")
    for output_name, dtype in zip(output_names, output_dtypes, strict=True):
        parameters.append(f"{TYPES[dtype]}* {output_name}")
    constants = "".join(constant(*argument) for argument in template)
    return kernel, (
        f"{HEADER}{header}namespace mlx::core::cu {{\n\nnamespace cg = cooperative_groups;\n\n"
        f"__global__ void {kernel}(\n    "
        + ",\n    ".join(parameters)
        + f") {{\n{constants}"
        + ("\n" if constants else "")
        + f"{source}\n}}\n\n}} // namespace mlx::core::cu\n"
    )


def padded(values: Sequence[int], dtype: type) -> np.ndarray:
    """A Shape or Strides parameter: ten numbers, as many as there are dimensions used."""
    whole = np.zeros(MAX_DIMENSIONS, dtype)
    whole[: len(values)] = values
    return whole


def extra_value(name: str, array: mx.array) -> np.ndarray | int:
    """The argument for one of EXTRAS; the simulator's inputs are row-contiguous."""
    if name == "ndim":
        return array.ndim
    if name == "shape":
        return padded(array.shape, np.int32)
    strides = [int(np.prod(array.shape[i + 1 :], dtype=np.int64)) for i in range(array.ndim)]
    return padded(strides, np.int64)


def cuda_kernel(
    name,
    input_names,
    output_names,
    source,
    header="",
    ensure_row_contiguous=True,
    shared_memory=0,
):
    """`mx.fast.cuda_kernel`: runs in the session that is open when it is called."""

    def call(
        *,
        inputs,
        output_shapes,
        output_dtypes,
        grid,
        threadgroup,
        template=None,
        init_value=None,
        verbose=False,
        stream=None,
    ):
        arrays = [a if isinstance(a, mx.array) else mx.array(a) for a in inputs]
        text = generate(
            *(name, input_names, output_names, source, header),
            *(arrays, output_dtypes, template or []),
        )
        if verbose:
            print(f"Generated source code for `{text[0]}`:\n```\n{text[1]}\n```")
        arguments, names = [], []
        for input_name, array in zip(input_names, arrays, strict=True):
            arguments.append(to_numpy(array))
            names.append(input_name)
            for extra, _ in wanted(source, input_name, array):
                arguments.append(extra_value(extra, array))
                names.append(f"{input_name}_{extra}")
        first = len(arguments)
        for shape, dtype in zip(output_shapes, output_dtypes, strict=True):
            arguments.append(to_numpy(mx.full(shape, init_value or 0, dtype=dtype)))
        fresh = range(first, len(arguments)) if init_value is None else ()
        names += list(output_names)
        run(*text, arguments, names, fresh, tuple(grid), tuple(threadgroup), shared_memory)
        results = zip(arguments[first:], output_shapes, output_dtypes, strict=True)
        return [from_numpy(a.reshape(s), d) for a, s, d in results]

    return call


def run(name, source, arguments, names, fresh, grid, threadgroup, shared) -> None:
    """One launch of generated text, logged; the grid counts threads, in whole blocks."""
    options, log = session.current(name)
    if shared > (granted := grant(source, shared)):
        raise ValueError(f"{name}: {shared} bytes of shared memory, MLX got it {granted}")
    folders = {Path(path).parent for path in re.findall(r'#include "(/[^"]+)"', source)}
    expression, checks = f"mlx::core::cu::{name}", (options.check, options.contract)
    kernel = compile_kernel(source, expression, sorted(folders), (), *checks)
    blocks = tuple(-(-a // b) for a, b in zip(grid, threadgroup, strict=True))
    threadgroup = tuple(map(min, threadgroup, grid))
    result = kernel(
        *(arguments, blocks, threadgroup, shared, fresh, names, options.threadgroup_limit),
        ftz=options.ftz,
        schedule=options.schedule,
        seed=options.seed,
        transactions=options.transactions,
    )
    counted = (result.findings, result.traffic, result.threadgroup_bytes, result.stats)
    log.append(session.Launch(name, source, grid, threadgroup, *counted))
    if result.findings and options.findings == "raise":
        raise core.CheckError(name, result.findings)


#: text of a kernel -> bytes of shared memory that its first launch wanted
_wanted: dict[str, int] = {}


def grant(source: str, shared: int) -> int:
    """Bytes of shared memory that a kernel may have: MLX asks once, at its first launch."""
    first = _wanted.setdefault(source, shared)
    return first if first > GRANTED else FREE_SHARED


def patched() -> contextlib.AbstractContextManager[None]:
    """Inside, MLX has a CUDA device, whose kernels run in the session that is open."""
    return has_gpu(mx.cuda, cuda_kernel)
