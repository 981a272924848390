"""What launch plans of every GPU are made of."""

from __future__ import annotations

from typing import Any, NamedTuple


class Output(NamedTuple):
    """An array a kernel writes."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Step(NamedTuple):
    """A launch (`metal_plan.Launch`, `cuda_plan.Launch`), and the name under which later ones read
    its first output."""

    launch: Any
    to: str
