"""Runs launch plans of `hadamoe.cuda_plan` in the simulator, on CPU tensors.

A stand-in for what `hadamoe.torch_cuda` does with ``_cuda``: the same kernels of ``cuda/*.cuh``,
with sizes as run-time arguments, as they are compiled for a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from . import core, session
from .cuda_kernel import Kernel, compile_kernel
from .toolchain import HERE

FOLDER = HERE.parent.parent / "cuda"
_TYPES = {
    "float32": "float",
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "int64": "long long",
    "int32": "int",
    "uint32": "unsigned int",
    "int8": "signed char",
    "uint8": "unsigned char",
    "bool": "bool",
}


@cache
def compiled() -> tuple[str, ...]:
    """Names of the kernels that ``cuda/*.cu`` list, in the order of `_cuda`'s table."""
    texts = [file.read_text() for file in sorted(FOLDER.glob("*.cu"))]
    names = [name for text in texts for name in re.findall(r"HM_KERNEL\(([^)]+)\)", text)]
    return tuple(" ".join(name.split()) for name in names)


@cache
def _kernel(
    file: str, name: str, arrays: tuple[tuple[str | None, bool], ...], sizes: tuple[type, ...],
    threads: int, check: bool, contract: bool, warpgroups: bool,
) -> Kernel:  # fmt: skip
    """arrays: element type or None for an absent one, whether it is written."""
    parameters, arguments = [], []
    for i, (dtype, written) in enumerate(arrays):
        if dtype is None:
            arguments.append("nullptr")
            continue
        parameters.append(f"{'' if written else 'const '}{_TYPES[dtype]}* a{i}")
        arguments.append(f"a{i}")
    for i, kind in enumerate(sizes):
        parameters.append(f"{kind.__name__} s{i}")
        arguments.append(f"s{i}")
    text = "#define __CUDA_ARCH_FEAT_SM90_ALL\n" if warpgroups else ""
    text += (
        f'#include "{file}.cuh"\n'
        f"static_assert({threads} <= hm::{name}::THREADS);\n"
        f"__global__ void entry({', '.join(parameters)}) {{\n"
        f"  hm::{name}::run({', '.join(arguments)});\n}}\n"
    )
    return compile_kernel(text, "entry", [FOLDER], check=check, contract=contract)


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory, as integers where numpy has no such type."""
    if not tensor.is_contiguous():
        raise ValueError("an array of a launch is not contiguous")
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def run(launch: Any, arrays: Mapping[str, torch.Tensor | Sequence[int]]) -> list[torch.Tensor]:
    """The outputs of a launch, one tensor for each, in the session that is open.

    Args:
        arrays: every input that is not absent and outputs that are there, by name; integers are
            handed over as int32.
    """
    if launch.name not in compiled():
        raise LookupError(f"{launch.name} is in no HM_KERNELS of cuda/*.cu, so _cuda lacks it")
    options, log = session.current(launch.name)
    inputs = [
        (a if isinstance(a, torch.Tensor) else torch.tensor(a, dtype=torch.int32)).contiguous()
        for a in (arrays[name] for name in launch.present)
    ]
    fresh, outputs = [], []
    for out in launch.outputs:
        given = arrays.get(out.name)
        if given is None:
            fresh.append(len(inputs) + len(outputs))
            given = torch.zeros(out.shape, dtype=getattr(torch, out.dtype))
        outputs.append(given)
    present = iter(inputs)
    kinds = [(_name(next(present)) if there else None, False) for there in launch.inputs.values()]
    kinds += [(_name(out), True) for out in outputs]
    sizes = tuple(launch.sizes.values())
    kernel = _kernel(
        launch.file, launch.name, tuple(kinds), tuple(map(type, sizes)), launch.threads,
        options.check, options.contract, options.warpgroups,
    )  # fmt: skip
    names = [*launch.present, *(out.name for out in launch.outputs), *launch.sizes]
    threads = (launch.threads, 1, 1)
    result = kernel(
        [*map(_numbers, (*inputs, *outputs)), *map(_size, sizes)],
        launch.groups,
        threads,
        launch.shared,
        fresh,
        names,
        options.threadgroup_limit,
        ftz=options.ftz,
        schedule=options.schedule,
        seed=options.seed,
        transactions=options.transactions,
    )
    counted = (result.findings, result.traffic, result.threadgroup_bytes, result.stats)
    log.append(session.Launch(launch.name, kernel.source, launch.groups, threads, *counted))
    if result.findings and options.findings == "raise":
        raise core.CheckError(launch.name, result.findings)
    return outputs


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _size(value: int | float) -> Any:
    return np.float32(value) if isinstance(value, float) else value
