"""Runs launch plans of `hadamoe.cuda_plan` through MLX, lazily, on its CUDA device.

MLX hashes a kernel's text each time it is launched and compiles it, with NVRTC, once per text. So
the text names a file of ``cuda`` and no sizes: those are an array, and a prompt of another length
compiles nothing. It is for the kinds of parts that the weight at hand has: that is compiled in
seconds, for all kinds it would be a minute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import mlx.core as mx

from . import cuda_delta, cuda_kv, cuda_moe, cuda_products
from .cuda_plan import FOLDER, Launch
from .gpu_calls import Front, Plans
from .gpu_plan import Output

_DTYPES = {
    n: getattr(mx, n)
    for n in ("float32", "float16", "bfloat16", "uint8", "uint32", "int32", "int8")
}
#: Bytes of shared memory above which MLX asks for leave, once for a kernel's name.
_GRANTED = 48000


def header(launch: Launch, name: str) -> str:
    """What stands before the kernel that MLX calls custom_kernel_<name>.

    A macro of that name, until `Launch.body` begins, puts the bounds of launches in front of it.
    """
    function = f"custom_kernel_{name}"
    kinds = ", ".join(f"{kind}u" for kind in launch.kinds)
    lines = [f"#define HM_KINDS {kinds}"] if kinds else []
    lines += [f'#include "{FOLDER}/{file}.cuh"' for file in (launch.file, "bounds")]
    lines.append(f"#define {function} HM_BOUNDS(hm::{launch.name}) {function}\n")
    return "\n".join(lines)


@cache
def _kernel(
    kernel: str,
    file: str,
    constants: tuple[int, ...],
    inputs: tuple[tuple[str, bool], ...],
    outputs: tuple[str, ...],
    sizes: tuple[tuple[str, float | None], ...],
    shared: int,
    kinds: tuple[int, ...],
) -> Any:
    """The kernel of every launch that has these in common: its text is made once.

    Args:
        sizes: values of floats, None for integers.
    """
    there = tuple([Output(name, (), "") for name in outputs])
    values = {name: 0 if value is None else value for name, value in sizes}
    grid = (1, 1, 1), 1
    launch = Launch(kernel, file, constants, dict(inputs), there, values, *grid, shared, kinds)
    name = "_".join(["hadamoe", kernel, *map(str, constants)])
    if shared > _GRANTED:
        name += f"_{shared}"
    return mx.fast.cuda_kernel(
        name=name,
        input_names=[*launch.present, "sizes"],
        output_names=list(outputs),
        header=header(launch, name),
        source=f"#undef custom_kernel_{name}\n{launch.body}",
        shared_memory=shared,
    )


def run(launch: Launch, arrays: Mapping[str, mx.array | Sequence[int]]) -> list[mx.array]:
    """The outputs of a launch, one array for each, none written in place.

    Args:
        arrays: every input that is not absent, by name; integers are handed over as int32.
    """
    sizes = launch.sizes.items()
    kernel = _kernel(
        launch.kernel,
        launch.file,
        launch.constants,
        tuple(launch.inputs.items()),
        tuple([out.name for out in launch.outputs]),
        tuple([(n, v if isinstance(v, float) else None) for n, v in sizes]),
        launch.shared,
        tuple(sorted(set(launch.kinds))),
    )
    inputs = [arrays[name] for name in launch.present]
    x, y, z = launch.groups
    return kernel(
        inputs=[
            a if isinstance(a, mx.array) else _integers(tuple(a))
            for a in (*inputs, launch.integers)
        ],
        output_shapes=[out.shape for out in launch.outputs],
        output_dtypes=[_DTYPES[out.dtype] for out in launch.outputs],
        grid=(x * launch.threads, y, z),
        threadgroup=(launch.threads, 1, 1),
    )


@lru_cache(4096)
def _integers(values: tuple[int, ...]) -> mx.array:
    """An array that stays where the GPU reads it: a new one would have to get there first."""
    return mx.array(values, mx.int32)


FRONT = Front(
    Plans(cuda_products, cuda_moe, cuda_delta, cuda_kv),
    *(mx.array, run, mx.argsort, mx.concatenate, mx.fast.rms_norm),
)
