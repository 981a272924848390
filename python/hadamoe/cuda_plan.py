"""The launch plans of the CUDA kernels: which kernel, over which arrays and sizes, in which grid.

A plan is plain Python and the same for every front end: `hadamoe.torch_cuda` hands it to ``_cuda``,
which has the kernels compiled, `hadamoe.mlx_cuda` to ``mx.fast.cuda_kernel``. Kernels are structs
with a function ``run`` in ``cuda/*.cuh``; ``cuda/*.cu`` lists the ones that are compiled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from .gpu_plan import Output

FOLDER = Path(__file__).parent / "cuda"
#: Numbers of element types that a kernel is told: ``Number`` in cuda/number.cuh.
NUMBERS = {"float32": 0, "float16": 1, "bfloat16": 2}


class Launch(NamedTuple):
    """One kernel launch.

    Attributes:
        kernel: struct template in ``cuda/<file>.cuh``.
        file: stem of its file.
        constants: integer template arguments, in order.
        inputs: names of the arrays it reads, in order; False for one that is absent (nullptr).
        outputs: arrays it writes; they follow the inputs. A front end allocates those it is not
            given.
        sizes: integers and floats that follow the arrays, in order.
        groups: thread blocks in x, y, z.
        threads: of a block.
        shared: bytes of shared memory.
    """

    kernel: str
    file: str
    constants: tuple[int, ...]
    inputs: Mapping[str, bool]
    outputs: tuple[Output, ...]
    sizes: Mapping[str, int | float]
    groups: tuple[int, int, int]
    threads: int
    shared: int = 0

    @property
    def name(self) -> str:
        """The kernel's C++ name, under which it is compiled."""
        constants = ", ".join(map(str, self.constants))
        return f"{self.kernel}<{constants}>" if constants else self.kernel

    @property
    def present(self) -> list[str]:
        """Names of the input arrays there are."""
        return [name for name, there in self.inputs.items() if there]

    @property
    def body(self) -> str:
        """The call, as the text of a kernel's body in which arrays have their names."""
        arrays = [name if there else "nullptr" for name, there in self.inputs.items()]
        arrays += [out.name for out in self.outputs]
        sizes = [literal(value) for value in self.sizes.values()]
        return f"  hm::{self.name}::run({', '.join([*arrays, *sizes])});"


def literal(value: int | float) -> str:
    """A size in C++."""
    return f"{float.hex(value)}f" if isinstance(value, float) else str(value)


@cache
def source(stem: str) -> str:
    """The text of ``cuda/<stem>.cuh`` with its own includes put in their place, once each; without
    comments."""
    seen: set[str] = set()

    def text(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        lines = (FOLDER / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
        lines = re.sub(r'#include "([\w.]+)"\n', lambda m: text(m[1]), lines)
        return re.sub(r"[ \t]*//[^\n]*", "", lines)

    return text(f"{stem}.cuh")
