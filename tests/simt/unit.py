"""What the rewriter finds in a source: kernels, their parameters, instances, function constants."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .tokens import is_directive
from .toolchain import CompileError


@dataclass
class Param:
    """A kernel's parameter: its text, and the attribute in [[ ]] with its argument."""

    text: str
    name: str
    attribute: str | None
    argument: str | None

    @property
    def is_buffer(self) -> bool:
        return self.attribute in (None, "buffer")

    @property
    def readonly(self) -> bool:
        words = re.split(r"[*&]", self.text)[0].split()
        return "const" in words or "constant" in self.text.split()


@dataclass
class Unit:
    """A rewritten source."""

    text: str = ""
    kernels: dict[str, list[Param]] = field(default_factory=dict)
    #: host_name -> the template-id it stands for
    instances: dict[str, str] = field(default_factory=dict)
    #: function constant -> (index, type)
    constants: dict[str, tuple[str, str]] = field(default_factory=dict)
    lint: list[str] = field(default_factory=list)


def parse_param(tokens: list[str]) -> Param:
    text = "".join(t for t in tokens if not is_directive(t)).strip()
    found = re.search(r"\[\[\s*(\w+)\s*(?:\(\s*([^)]*)\s*\))?\s*\]\]", text)
    text = re.sub(r"\[\[.*?\]\]", "", text, flags=re.S).strip()
    text = re.sub(r"(\w+)\s*\[[^\]]*\]\s*$", r"* \1", text)
    name = re.search(r"(\w+)\s*$", text)
    if name is None:
        raise CompileError(f"a kernel's parameter has no name: {text!r}")
    return Param(text, name[1], *(found.groups() if found else (None, None)))
