"""What every op claims, and the checks that tests and ``hadamoe verify`` share.

A claim is checked on a `Case`: one call of an op, what must come out and how far off it may be.
`cases` makes them in two kinds:

- exact: integer inputs, codes of every value and power-of-two scales make every product and partial
  sum a small multiple of 2^-2, so f32 arithmetic in any order is exact and the tolerance is zero.
  This finds every indexing, packing, tail and gather bug.
- bound: Gaussian data; the result stays within the rounding bound of the longest chain of additions
  (`rounding_bound`), and of products within what fixed point adds to it (`bounds`). No tolerance is
  chosen by hand.

Outputs start as NaN (`Poisoned`), so an element a kernel leaves unwritten breaks either claim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .. import kv_ops, ops
from ..weight import Instance

#: Unit roundoff of every dtype a kernel stores.
UNIT = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
#: Least positive normal number: below it a rounding error is absolute.
TINY = {"f32": 2.0**-126, "f16": 2.0**-14, "bf16": 2.0**-126}


def gamma(chain: int, unit: float = UNIT["f32"]) -> float:
    """chain*u / (1 - chain*u): relative error of a chain of roundings (Higham, lemma 3.1)."""
    return chain * unit / (1 - chain * unit)


def rounding_bound(terms: np.ndarray, chain: int, value: np.ndarray, dtype: str) -> np.ndarray:
    """Bound of |kernel - exact| of a sum: gamma(chain) * terms, then one rounding to ``dtype``.

    ``terms`` is the sum of magnitudes per output, ``chain`` the longest chain of roundings between
    an input and an output, ``value`` the exact result.
    """
    inner = gamma(chain) * terms
    if dtype == "f32":
        return inner
    return inner + UNIT[dtype] * np.maximum(np.abs(value) + inner, TINY[dtype])


class ClaimError(AssertionError):
    """A kernel broke a claim; the message names the case, the place and the numbers."""


@dataclass(frozen=True, slots=True)
class Case:
    """One call of an op and what it claims.

    Attributes:
        op: a function of `hadamoe.ops`.
        claim: ``exact``, ``bound``.
        label: what tells this case from the op's others.
        instance: the instance under test; None for an op without weights.
        run: calls the op; returns its outputs.
        expected: f64 or f32 arrays, one per output.
        bound: per output, the largest |error| allowed; None where the claim is ``exact``.
    """

    op: str
    claim: str
    label: str
    instance: Instance | None
    run: Callable[[], tuple[np.ndarray, ...]]
    expected: tuple[np.ndarray, ...]
    bound: tuple[np.ndarray, ...] | None = None

    def __str__(self) -> str:
        return " ".join(filter(None, [self.op, str(self.instance or ""), self.label, self.claim]))


def compare(case: Case, outputs: tuple[np.ndarray, ...]) -> float:
    """Worst |error| / bound over the outputs (0 for an exact claim that holds).

    Raises:
        ClaimError: an output has another shape, holds a NaN, differs, or leaves its bound.
    """
    worst = 0.0
    for i, (got, want) in enumerate(zip(outputs, case.expected, strict=True)):
        if got.shape != want.shape:
            raise ClaimError(f"{case}: output {i} has shape {got.shape}, needs {want.shape}")
        error = np.abs(got.astype(np.float64) - want)
        allowed = np.zeros_like(error) if case.bound is None else case.bound[i]
        bad = ~(error <= allowed)  # catches NaN: an element no kernel wrote
        if bad.any():
            at = np.unravel_index(np.argmax(bad), bad.shape)
            place = "[" + ", ".join(map(str, map(int, at))) + "]"
            raise ClaimError(
                f"{case}: output {i} is wrong in {bad.sum()} of {bad.size} places, first {place}: "
                f"{got[at]!r}, needs {want[at]!r} within {allowed[at]:.3g}"
            )
        if case.bound is not None and error.size:
            worst = max(worst, float((error / np.maximum(allowed, 1e-300)).max()))
    return worst


class Poisoned:
    """A native module whose outputs start as NaN, so that an element left unwritten is found."""

    #: Outputs that are also inputs.
    STATES: ClassVar = {
        op: {1, 2} for op in ("gated_delta", "gated_delta_block", "attention", "attention_block")
    } | {op: {1, 2, 3, 4} for op in ("kv_attend", "kv_attention_block")}

    def __init__(self, native: Any) -> None:
        self._native = native

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def call(self, op: str, inputs: list, outputs: list, ints: list, floats: list) -> None:
        """`_cpu.call` on outputs filled with 0xFF bytes, a NaN in every float dtype."""
        for i, out in enumerate(outputs):
            if isinstance(out, np.ndarray) and i not in self.STATES.get(op, ()):
                out.view(np.uint8)[...] = 0xFF
        self._native.call(op, inputs, outputs, ints, floats)


@contextmanager
def native(module: Any) -> Iterator[None]:
    """Lets `hadamoe.ops` and `hadamoe.kv_ops` call ``module`` in place of ``_cpu``."""
    before = ops._cpu
    ops._cpu = kv_ops._cpu = module
    try:
        yield
    finally:
        ops._cpu = kv_ops._cpu = before


def check(case: Case, module: Any = None) -> float:
    """Runs a case on outputs that start as NaN and compares; returns `compare`'s figure."""
    with native(Poisoned(module or ops._cpu)):
        return compare(case, case.run())


def check_deterministic(case: Case, module: Any = None) -> None:
    """The same bits with 1, 2 and 5 threads, and again.

    Raises:
        ClaimError: two runs differ.
    """
    module = module or ops._cpu
    before = ops.threads()
    try:
        with native(Poisoned(module)):
            runs = []
            for threads in (1, 2, 2, 5):
                module.set_threads(threads)
                runs.append([out.tobytes() for out in case.run()])
    finally:
        module.set_threads(before)
    if any(run != runs[0] for run in runs):
        raise ClaimError(f"{case}: other threads or another run give other bits")
