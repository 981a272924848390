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


@cache
def compiled() -> tuple[str, ...]:
    """Names of the kernels that ``cuda/*.cu`` list, in the order of `_cuda`'s table."""
    texts = [file.read_text() for file in sorted(FOLDER.glob("*.cu"))]
    names = [name for text in texts for name in re.findall(r"HM_KERNEL\(([^)]+)\)", text)]
    return tuple(" ".join(name.split()) for name in names)


@cache
def _kernel(file: str, name: str, check: bool, contract: bool, warpgroups: bool) -> Kernel:
    """A kernel, compiled once for all launches as it is for a GPU: absent arrays are null then."""
    text = "#define __CUDA_ARCH_FEAT_SM90_ALL\n" if warpgroups else ""
    text += f'#include "{file}.cuh"\n'
    text += f'extern "C" int most_threads() {{ return hm::{name}::THREADS; }}\n'
    return compile_kernel(text, f"hm::{name}::run", [FOLDER], check=check, contract=contract)


def _fits(launch: Any, kernel: Kernel, arrays: Sequence[torch.Tensor | None]) -> None:
    """Holds a plan to the signature of its kernel, which `_cuda` takes on trust.

    Raises:
        TypeError: an array or a size has another type. ValueError: too many threads.
    """
    most = kernel.function("most_threads")()
    if launch.threads > most:
        raise ValueError(f"{launch.name}: {launch.threads} threads, its THREADS are {most}")
    names = [*launch.inputs, *(out.name for out in launch.outputs)]
    for i, (name, tensor) in enumerate(zip(names, arrays, strict=True)):
        kind, (item, size) = kernel.parameters[i][0], kernel.items[i]
        if kind != ("c" if i < len(launch.inputs) else "p"):
            raise TypeError(f"{launch.name}: {name} is no array that it reads, or writes")
        if tensor is None or item == "v":
            continue
        wanted = item == "i", size
        if wanted != (not tensor.is_floating_point(), tensor.element_size()):
            raise TypeError(
                f"{launch.name}: {name} is {tensor.dtype}, needs {size} bytes of {item}"
            )
    for (name, size), (kind, _) in zip(
        launch.sizes.items(), kernel.parameters[len(names) :], strict=True
    ):
        if kind != ("f" if isinstance(size, float) else "i"):
            raise TypeError(f"{launch.name}: {name} is {type(size).__name__}, needs {kind}")


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
            fresh.append(len(launch.inputs) + len(outputs))
            given = torch.zeros(out.shape, dtype=getattr(torch, out.dtype))
        outputs.append(given)
    present = iter(inputs)
    every = [*(next(present) if there else None for there in launch.inputs.values()), *outputs]
    kernel = _kernel(launch.file, launch.name, options.check, options.contract, options.warpgroups)
    _fits(launch, kernel, every)
    sizes = tuple(launch.sizes.values())
    names = [*launch.inputs, *(out.name for out in launch.outputs), *launch.sizes]
    threads = (launch.threads, 1, 1)
    result = kernel(
        [*(a if a is None else _numbers(a) for a in every), *map(_size, sizes)],
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


def _size(value: int | float) -> Any:
    return np.float32(value) if isinstance(value, float) else value
