"""Which line of metal/*.metal a line of a generated kernel text is.

Kernel texts are made from those files without comments and spaces, with macros for frequent words
(hadamoe.metal_plan.source), but line by line: equal lines are found again.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from .toolchain import HERE

SOURCES = HERE.parent.parent / "metal"


class Place(NamedTuple):
    """A line of a file; str() is file:line."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def _squeezed(line: str) -> str:
    return re.sub(r"\s+", "", re.sub(r"//.*", "", line))


@cache
def _known(folder: Path) -> dict[str, list[Place]]:
    """Squeezed line -> where it stands, for every line that says something."""
    known: dict[str, list[Place]] = {}
    for path in sorted(folder.glob("*.metal")):
        for number, text in enumerate(path.read_text().splitlines(), 1):
            key = _squeezed(text)
            if len(key) > 3:
                place = Place(f"{folder.name}/{path.name}", number, text.strip())
                known.setdefault(key, []).append(place)
    return known


class Origins:
    """The lines of one kernel text, by number."""

    def __init__(self, source: str, folder: Path = SOURCES):
        self.lines = source.splitlines()
        self._folder = folder
        self._macros = dict(re.findall(r"^#define (\w+) (\w+)$", source, re.M))

    def text(self, number: int) -> str:
        """A line of the kernel text itself; empty outside of it."""
        return self.lines[number - 1].strip() if 0 < number <= len(self.lines) else ""

    def _candidates(self, number: int) -> list[Place]:
        written = re.sub(r"\b\w+\b", lambda m: self._macros.get(m[0], m[0]), self.text(number))
        return _known(self._folder).get(_squeezed(written), [])

    def origin(self, number: int) -> Place | None:
        """Where the line comes from; where it stands in several places, the one that follows the
        line before it."""
        candidates = self._candidates(number)
        for before in range(number, max(0, number - 40), -1):
            known = self._candidates(before)
            if len(known) == 1:
                wanted = known[0].line + number - before
                here = [c for c in candidates if c.file == known[0].file]
                return min(here, key=lambda c: abs(c.line - wanted), default=None)
        return None
