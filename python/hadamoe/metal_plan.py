"""The launch plans of the Metal kernels: which function, over which arrays, in which grid.

A plan is plain Python and the same for every front end: `hadamoe.mlx_metal` hands it to
``mx.fast.metal_kernel``, `hadamoe.torch_mps` to ``torch.mps.compile_shader``. Kernels are function
templates in ``metal/*.metal``; what a front end compiles is that file and one call.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from string import ascii_uppercase, digits
from typing import NamedTuple

from .gpu_plan import Output

FOLDER = Path(__file__).parent / "metal"
#: Threads of a group, at most.
THREADS = 256


class Launch(NamedTuple):
    """One kernel launch.

    Attributes:
        kernel: function template in ``metal/<file>.metal``.
        file: stems of its files, joined by ``+``: the function's own, last, after those of the
            tables it reads.
        constants: integer template arguments, in order.
        inputs: names of the arrays it reads, in order; a name may stand for an absent array, given
            with the element type of the null pointer that is passed for it.
        outputs: arrays it writes; they follow the inputs.
        groups: threadgroups in x, y, z.
        threads: of a group.
        shared: threadgroup arrays (element type, count); they follow the outputs. A null pointer
            for a count of 0.
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
            if count:
                lines.append(f"  threadgroup {kind} shared{i}[{count}];")
            arguments.append(f"shared{i}" if count else f"(threadgroup {kind}*)nullptr")
        constants = ", ".join(map(str, self.constants.values()))
        lines.append(
            "  const hm::Place at{threadgroup_position_in_grid, thread_index_in_threadgroup, "
            "simdgroup_index_in_threadgroup, thread_index_in_simdgroup};"
        )
        lines.append(f"  hm::{self.kernel}<{constants}>({', '.join(arguments)}, at);")
        return "\n".join(lines)


@cache
def source(stem: str) -> str:
    """The text of files of ``metal``: includes put in their place, once each; no comments.

    Args:
        stem: stems of files, joined by ``+``.
    """
    seen: set[str] = set()

    def text(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        lines = (FOLDER / name).read_text(encoding="utf-8")
        lines = re.sub(r'#include "([\w.]+)"\n', lambda m: text(m[1]), lines)
        return re.sub(r"[ \t]*//[^\n]*", "", lines)

    whole = "".join(text(f"{name}.metal") for name in stem.split("+"))
    return short(whole)


def short(text: str) -> str:
    """The same program in fewer characters: MLX hashes a kernel's text each time it is launched.

    Spaces and lines of braces go, and a word that is written often becomes a macro of two letters.
    Statements keep lines of their own, so that a compiler's messages still lead to their place.
    """
    text = re.sub(r"\}\s*namespace hm \{", "", re.sub(r"\n\s+", "\n", text)).strip() + "\n"
    text = re.sub(r" ?([=*/<>(){},;:?&|^%!+-]+) ?", r"\1", text)
    text = re.sub(r"^([^#\n].*\{)\n(?!#)", r"\1", text, flags=re.M)
    text = re.sub(r"^([^#\n].*)(?:\n(\}+;?))+(?=\n)", _joined, text, flags=re.M)
    code = re.findall(r"^[^#].*", text, re.M)
    counts = Counter(w for line in code for w in re.findall(r"[A-Za-z_]\w{3,}", line))
    names = (a + b for a in ascii_uppercase for b in digits if a + b not in text)
    macros = {
        word: name
        for (word, n), name in zip(counts.most_common(), names, strict=False)
        if n * (len(word) - 2) > len(f"#define {name} {word}\n")
    }
    words = re.compile(r"\b(" + "|".join(macros) + r")\b") if macros else re.compile("$^")
    text = re.sub(
        r"^[^#].*", lambda line: words.sub(lambda m: macros[m[1]], line[0]), text, flags=re.M
    )
    return "".join(f"#define {name} {word}\n" for word, name in macros.items()) + text


def _joined(lines: re.Match[str]) -> str:
    return lines[0].replace("\n", "")


def null(dtype: str) -> str:
    """The element type of an absent array of numbers."""
    return {"float32": "float", "float16": "half", "bfloat16": "bfloat"}[dtype]


def float_bits(value: float) -> int:
    """A float as an integer template argument."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


#: MSL's names of element types.
_TYPES = {
    "float32": "float",
    "float16": "half",
    "bfloat16": "bfloat",
    "int64": "long",
    "int32": "int",
    "uint32": "uint",
    "int8": "char",
    "uint8": "uchar",
    "bool": "bool",
}
_PLACE = {
    "threadgroup_position_in_grid": "uint3",
    "thread_index_in_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
}


def shader(launch: Launch, dtypes: tuple[str | None, ...]) -> str:
    """A whole Metal source with the launch as its one kernel, for `torch.mps.compile_shader`.

    Args:
        dtypes: of the input arrays there are; None for a few integers in constant memory.
    """
    names = [*launch.present, *(out.name for out in launch.outputs)]
    kinds = [f"const device {_TYPES[d]}" if d else "const constant int" for d in dtypes]
    kinds += [f"device {_TYPES[out.dtype]}" for out in launch.outputs]
    parameters = [
        f"{kind}* {name} [[buffer({i})]]"
        for i, (kind, name) in enumerate(zip(kinds, names, strict=True))
    ]
    parameters += [f"{kind} {name} [[{name}]]" for name, kind in _PLACE.items()]
    head = f"[[kernel]] void {launch.name}(\n  " + ",\n  ".join(parameters) + ") {\n"
    return f"#include <metal_stdlib>\n{source(launch.file)}{head}{launch.body}\n}}\n"
