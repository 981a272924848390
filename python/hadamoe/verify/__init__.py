"""The kernels' claims, proved on this machine: every op, every instance, every instruction set.

`run` is what ``hadamoe verify`` shows. It needs no test tools and no checkpoint; with a checkpoint
it also multiplies rows of every kind of weight the files hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from typing import NamedTuple

import numpy as np

from .. import ops
from ..weight import Instance, Part, Weight
from . import cases, claims, samples


class Row(NamedTuple):
    """One line of the report.

    Attributes:
        op: a function of `hadamoe.ops`.
        instance: table, bits and scale as text; empty for an op without weights.
        isa: the instruction set the claim ran on.
        claim: ``exact``, ``bound``, ``deterministic`` or ``file``.
        passed: whether every case held.
        cases: how many cases ran.
        worst: largest |error| / allowed error; 0 for exact claims.
        ms: wall-clock milliseconds of all cases.
        detail: what failed first, with the numbers; empty when passed.
    """

    op: str
    instance: str
    isa: str
    claim: str
    passed: bool
    cases: int
    worst: float
    ms: float
    detail: str = ""


Progress = Callable[[Row], None]
Group = tuple[tuple[str, Instance | None], list[claims.Case]]


def _prove(
    op: str, instance: str, isa: str, claim: str, checks: Iterable[Callable[[], float]]
) -> Row:
    """Runs checks until one raises ClaimError; everything else is a bug and propagates."""
    start, count, worst, detail = time.perf_counter(), 0, 0.0, ""
    for check in checks:
        count += 1
        try:
            worst = max(worst, check())
        except claims.ClaimError as error:
            detail = str(error)
            break
    ms = (time.perf_counter() - start) * 1e3
    return Row(op, instance, isa, claim, not detail, count, worst, ms, detail)


def _deterministic(case: claims.Case) -> float:
    claims.check_deterministic(case)
    return 0.0


def _synthetic(isa: str, everything: list[Group]) -> Iterator[Row]:
    for (op, instance), group in everything:
        name = str(instance or "")
        for claim in ("exact", "bound"):
            chosen = [c for c in group if c.claim == claim]
            if chosen:
                checks = [lambda c=c: claims.check(c) for c in chosen]
                yield _prove(op, name, isa, claim, checks)
        last = group[-1]
        yield _prove(op, name, isa, "deterministic", [lambda c=last: _deterministic(c)])


def _kinds(weight: Weight) -> dict[tuple[Instance, int, int], list[Part]]:
    """The weight's parts by (instance, group, columns)."""
    found: dict[tuple[Instance, int, int], list[Part]] = {}
    for expert in weight.parts:
        for part in expert:
            found.setdefault((part.instance, part.group, weight.columns), []).append(part)
    return found


def _checkpoint(directory: str | PathLike[str], isa: str) -> Iterator[Row]:
    """Real weights: up to 32 rows of one matrix of every instance, group and width, against f64."""
    from .. import formats

    seen: set[tuple[Instance, int, int]] = set()
    rng = np.random.default_rng(0)
    for name, weight in formats.read(directory).weights.items():
        for kind, parts in _kinds(weight).items():
            if kind in seen:
                continue
            seen.add(kind)
            inst, group, columns = kind
            if not ops.supports(inst):
                detail = f"{name} needs {inst}, for which this build has no code"
                yield Row("qmatmul", str(inst), isa, "file", False, 0, 0.0, 0.0, detail)
                continue
            part = parts[rng.integers(len(parts))]
            first = int(rng.integers(max(1, part.rows - 31)))
            sample = Weight(columns, ((samples.slice_rows(part, first, first + 32),),))
            x = rng.standard_normal((3, columns)).astype(np.float32)
            case = cases.qmatmul_case(inst, "gaussian", f"{name} group={group}", x, sample, None)
            yield _prove("qmatmul", str(inst), isa, "file", [lambda case=case: claims.check(case)])


def run(
    directory: str | PathLike[str] | None = None, progress: Progress | None = None
) -> list[Row]:
    """Proves every claim on every instruction set of this machine.

    Args:
        directory: a checkpoint; its own weights are then multiplied too (a few rows of each kind).
        progress: called with every row as soon as it is known.

    Returns:
        Rows in the order they ran. The instruction set in use is restored.

    Raises:
        FormatError: the directory is not a checkpoint hadamoe reads.
    """
    rows: list[Row] = []
    everything = list(cases.by_op_and_instance())
    before = ops.isa()
    try:
        for isa in ops.isas():
            ops.set_isa(isa)
            steps = [_synthetic(isa, everything)]
            if directory is not None:
                steps.append(_checkpoint(directory, isa))
            for row in (row for step in steps for row in step):
                rows.append(row)
                if progress is not None:
                    progress(row)
    finally:
        ops.set_isa(before)
    return rows
