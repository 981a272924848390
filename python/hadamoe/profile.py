"""Where the time of a decoded token goes, by module and native op, and how much of it is products
with weights."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import _cpu, torch_run

__all__ = ["Line", "Profile", "profile"]

_KINDS = {
    "embed_tokens": "embeddings", "linear_attn": "delta net", "self_attn": "attention",
    "mlp": "experts", "lm_head": "head",
}  # fmt: skip
_MODULE = re.compile(r"(?:layers\.\d+\.)?(\w+)")


@dataclass(slots=True)
class Line:
    """Native calls of one op from one kind of module, per decoded token.

    Attributes:
        kind, op: which. calls: how many.
        seconds: from the call's first instruction to its return, the handing over of arrays too.
        product_seconds: of these, inside products with weights. nbytes: of weights they read.
    """

    kind: str
    op: str
    calls: float = 0.0
    seconds: float = 0.0
    product_seconds: float = 0.0
    nbytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Profile:
    """A decoded token.

    Attributes:
        tokens: how many this is the mean of.
        seconds: of a token in all. python_seconds: of these, outside native calls.
        lines: native calls, in the order a token meets them.
    """

    tokens: int
    seconds: float
    python_seconds: float
    lines: list[Line]

    @property
    def product_seconds(self) -> float:
        """Inside products with weights."""
        return sum(line.product_seconds for line in self.lines)

    @property
    def nbytes(self) -> float:
        """Bytes of weights read."""
        return sum(line.nbytes for line in self.lines)


class _Call(NamedTuple):
    seconds: float
    kind: str
    op: str
    product_seconds: float
    nbytes: int
    overhead: float


def profile(model: Any, ids: Any, new_tokens: int) -> Profile:
    """Generate ``new_tokens`` likeliest tokens after integer ids ``[1, t]`` and take them apart.

    The first new token ends the prefill and is not counted; the profile's own time is taken off.
    """
    with _recorded(model) as calls:
        done = torch_run.generate(model, ids, new_tokens)
    first = next(i for i, c in enumerate(calls) if c.kind == "head")  # ends the prefill
    calls = calls[first + 1 :]
    tokens = done.new_tokens - 1
    lines: dict[tuple[str, str], Line] = {}
    for c in calls:
        line = lines.setdefault((c.kind, c.op), Line(c.kind, c.op))
        line.calls += 1 / tokens
        line.seconds += c.seconds / tokens
        line.product_seconds += c.product_seconds / tokens
        line.nbytes += c.nbytes / tokens
    seconds = (done.decode_seconds - sum(c.overhead for c in calls)) / tokens
    native = sum(line.seconds for line in lines.values())
    return Profile(tokens, seconds, seconds - native, list(lines.values()))


@contextmanager
def _recorded(model: Any) -> Iterator[list[_Call]]:
    """Every native call of this process until the end, as a list that fills."""
    kinds = {id(module): _kind(path) for path, module in model.named_modules() if path}
    calls: list[_Call] = []
    call, bound, clock = _cpu.call, _cpu.Bound.__call__, time.perf_counter

    def timed(native: Any, op: str, *args: Any) -> None:
        entered = clock()
        kind, before = _caller(kinds), _cpu.products()
        start = clock()
        native(*args)
        end = clock()
        after = _cpu.products()
        spent, nbytes = (after[0] - before[0]) / 1e9, after[1] - before[1]
        overhead = start - entered + clock() - end
        calls.append(_Call(end - start, kind, op, spent, nbytes, overhead))

    _cpu.count_products(True)
    _cpu.call = lambda op, *args: timed(call, op, op, *args)
    _cpu.Bound.__call__ = lambda self, *args: timed(bound, self.op, self, *args)
    try:
        yield calls
    finally:
        _cpu.call, _cpu.Bound.__call__ = call, bound
        _cpu.count_products(False)


def _kind(path: str) -> str:
    """What part of the model a module's path is in."""
    name = _MODULE.match(path.rpartition("model.")[2])
    return _KINDS.get(name[1], name[1]) if name else path


def _caller(kinds: dict[int, str]) -> str:
    """The kind of the innermost module whose method is running."""
    frame = sys._getframe(3)
    while frame is not None:
        kind = kinds.get(id(frame.f_locals.get("self")))
        if kind is not None:
            return kind
        frame = frame.f_back
    return "-"
