"""The launch plans of the Metal kernels: which function, over which arrays, in which grid.

A plan is plain Python and the same for every front end: `hadamoe.mlx_metal` hands it to
``mx.fast.metal_kernel``, `hadamoe.torch_mps` to ``torch.mps.compile_shader``. Kernels are function
templates in ``metal/*.metal``; what a front end compiles is that file and one call.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "metal"
#: Threads of a group, at most.
THREADS = 256


class Output(NamedTuple):
    """An array a kernel writes."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Launch(NamedTuple):
    """One kernel launch.

    Attributes:
        kernel: function template in ``metal/<file>.metal``.
        file: its file's stem.
        constants: integer template arguments, in order.
        inputs: names of the arrays it reads, in order; a name may stand for an absent array, given
            with the element type of the null pointer that is passed for it.
        outputs: arrays it writes; they follow the inputs.
        groups: threadgroups in x, y, z.
        threads: of a group.
        shared: threadgroup arrays (element type, count); they follow the outputs.
    """

    kernel: str
    file: str
    constants: Mapping[str, int]
    inputs: Mapping[str, str | None]
    outputs: tuple[Output, ...]
    groups: tuple[int, int, int]
    threads: int
    shared: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        """Different for launches whose text differs."""
        values = "_".join(str(v).replace("-", "m") for v in self.constants.values())
        absent = "".join("0" if absent else "1" for absent in self.inputs.values())
        return f"hadamoe_{self.kernel}_{values}_{absent}"

    @property
    def present(self) -> list[str]:
        """Names of the input arrays there are."""
        return [name for name, absent in self.inputs.items() if not absent]

    @property
    def body(self) -> str:
        """The call, as the text of a kernel's body."""
        arguments = [f"(const device {a}*)nullptr" if a else n for n, a in self.inputs.items()]
        arguments += [out.name for out in self.outputs]
        lines = []
        for i, (kind, count) in enumerate(self.shared):
            lines.append(f"  threadgroup {kind} shared{i}[{count}];")
            arguments.append(f"shared{i}")
        if self.constants:
            named = ", ".join(f"{name} = {value}" for name, value in self.constants.items())
            lines.append(f"  constexpr int {named};")
        constants = ", ".join(self.constants)
        lines.append(
            "  const hm::Place at{threadgroup_position_in_grid, thread_index_in_threadgroup, "
            "simdgroup_index_in_threadgroup, thread_index_in_simdgroup};"
        )
        lines.append(f"  hm::{self.kernel}<{constants}>({', '.join(arguments)}, at);")
        return "\n".join(lines)


@cache
def source(stem: str) -> str:
    """The text of ``metal/<stem>.metal``: includes put in their place, once each; no comments."""
    seen: set[str] = set()

    def text(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        lines = (FOLDER / name).read_text(encoding="utf-8")
        lines = re.sub(r'#include "([\w.]+)"\n', lambda m: text(m[1]), lines)
        return re.sub(r"[ \t]*//[^\n]*", "", lines)

    # MLX hashes a kernel's text each time it is used
    return re.sub(r"\n\s+", "\n", text(f"{stem}.metal")).lstrip()


def null(dtype: str) -> str:
    """The element type of an absent array of numbers."""
    return {"float32": "float", "float16": "half", "bfloat16": "bfloat"}[dtype]


def float_bits(value: float) -> int:
    """A float as an integer template argument."""
    return struct.unpack("<i", struct.pack("<f", value))[0]
