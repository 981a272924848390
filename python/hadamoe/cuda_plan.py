"""The launch plans of the CUDA kernels: which kernel, over which arrays and sizes, in which grid.

A plan is plain Python and the same for every front end: `hadamoe.torch_cuda` hands it to ``_cuda``,
which has the kernels compiled, `hadamoe.mlx_cuda` to ``mx.fast.cuda_kernel``, which compiles them.
Kernels are structs with a function ``run`` in ``cuda/*.cuh``; ``cuda/*.cu`` lists instances.
"""

from __future__ import annotations

from collections.abc import Mapping
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
        kinds: of the parts that weights have: a text compiled for one launch is for these alone.
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
    kinds: tuple[int, ...] = ()

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
    def integers(self) -> list[int]:
        """Sizes that are integers, in order."""
        return [value for value in self.sizes.values() if not isinstance(value, float)]

    @property
    def body(self) -> str:
        """The call, as the text of a kernel's body in which arrays have their names and `integers`
        are an array ``sizes``."""
        arguments = [name if there else "nullptr" for name, there in self.inputs.items()]
        arguments += [out.name for out in self.outputs]
        places = iter(range(len(self.sizes)))
        for value in self.sizes.values():
            is_float = isinstance(value, float)
            arguments.append(f"{value.hex()}f" if is_float else f"sizes[{next(places)}]")
        return f"  hm::{self.name}::run({', '.join(arguments)});"
