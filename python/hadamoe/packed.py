"""A weight in the form ops take: a table of parts and the buffers they point into.

The table's rows are ``hm_part`` of csrc/core/abi.h. Buffers are whole mapped files, found through
the arrays' base, so a model of 15 GB packs without reading a byte.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _cpu
from .errors import ContractError, UnsupportedError
from .weight import Instance, Part, Rotation, Weight, root_of

PART_FIELDS = 12  # csrc/core/abi.h, hm_part


@functools.cache
def instances() -> tuple[Instance, ...]:
    """Every instance this build has code for, in the order of ``csrc/core/instances.h``."""
    return tuple(Instance(*i) for i in _cpu.instances())


def supports(instance: Instance) -> bool:
    """Whether this build has code for the instance."""
    return Instance(*instance) in instances()


def census(weights: Iterable[Weight]) -> None:
    """Raises one UnsupportedError that lists every instance this build lacks for the weights."""
    have = set(instances())
    users: dict[str, int] = {}
    for weight in weights:
        for instance in weight.instances() - have:
            users[str(instance)] = users.get(str(instance), 0) + 1
    if users:
        missing = ", ".join(f"{name} ({n} weights)" for name, n in sorted(users.items()))
        known = " ".join(map(str, instances()))
        raise UnsupportedError(f"load: this build has no kernels for {missing}; it has {known}")


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class PackedWeight:
    """A `Weight` in the form ops take: a table of parts and the buffers it points into.

    Attributes:
        parts: int64 ``[experts, parts, 12]``, one ``hm_part`` (csrc/core/abi.h) each.
        buffers: u8 arrays the offsets count in: whole mapped files, shared, never copied.
        rows: rows n of one expert.
        columns: columns k of the (padded) matrix.
        experts: E.
        rotation: what the input must go through first, or None.
        in_features: columns of the matrix before padding.
    """

    parts: Any
    buffers: tuple[Any, ...]
    rows: int
    columns: int
    experts: int
    rotation: Rotation | None
    in_features: int

    def arguments(self) -> tuple[list[Any], list[Any], list[int]]:
        """(signs, parts tables, integers) of native ops that rotate: block -1 is no rotation, 0
        powers of two."""
        r = self.rotation
        signs, block = ([r.pre, r.post], r.block or 0) if r else ([None, None], -1)
        return signs, [self.parts], [block]


class _Buffers:
    """Finds or adds the buffer an array lives in."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self._known: dict[int, tuple[int, int]] = {}  # id of a root -> (buffer number, address)

    def place(self, array: np.ndarray | None) -> tuple[int, int]:
        if array is None:
            return -1, 0
        if not array.flags.c_contiguous:
            raise ContractError("pack: array is not contiguous, needs row-major memory")
        root = root_of(array)
        known = self._known.get(id(root))
        if known is None:
            if not root.flags.c_contiguous:
                raise ContractError("pack: array's base is not contiguous, needs row-major memory")
            known = len(self.arrays), root.__array_interface__["data"][0]
            self._known[id(root)] = known
            self.arrays.append(root.reshape(-1).view(np.uint8))  # keeps root, so its id stays taken
        number, address = known
        return number, array.__array_interface__["data"][0] - address


def rotated_columns(columns: int, block: int | None) -> int:
    """Columns of a rotated row: padded to whole blocks."""
    return columns if block is None else -(-columns // block) * block


#: numpy's dtypes for arrays that hold numbers of a storage dtype
_STORED = {
    name: tuple(map(np.dtype, codes))
    for name, codes in {"f32": ["f4"], "f16": ["u2", "f2"], "bf16": ["u2"], "e8m0": ["u1"]}.items()
}


def _check(part: Part, columns: int) -> None:
    """What the kernels cannot see: they know an array's bytes, not its dtype or shape."""
    table, bits, scale = part.instance
    if part.codes.ndim != 2 or len(part.codes) != part.rows:
        raise ContractError(f"pack: codes has shape {part.codes.shape}, needs {part.rows} rows")
    scaled, groups = table not in ("plain", "e2m1_gguf"), -(-columns // max(part.group, 1))
    for name, array, wanted, shape, store in (
        ("scale", part.scale, scaled, (part.rows, groups), scale),
        ("bias", part.bias, table == "linear", (part.rows, groups), scale),
        ("codebook", part.codebook, table == "codebook", (1 << bits,), "f32"),
    ):
        if array is None and (name == "bias" or not wanted):
            continue
        fits = array is not None and array.dtype in _STORED[store] and array.shape == shape
        if not (wanted and fits):
            has = "none" if array is None else f"{array.dtype} {list(array.shape)}"
            needs = f"{' or '.join(map(str, _STORED[store]))} {list(shape)}" if wanted else "none"
            raise ContractError(f"pack: {name} of {part.instance} is {has}, needs {needs}")


def pack(*weights: Weight) -> tuple[PackedWeight, ...] | PackedWeight:
    """Weights in the form ops take; several share one list of buffers. Nothing is copied.

    Raises:
        ContractError: an array is not what the part's instance needs.
        UnsupportedError: an instance this build has no code for, naming those it has.
    """
    buffers = _Buffers()
    number = {inst: i for i, inst in enumerate(instances())}
    tables = []
    for w in weights:
        width = max(len(expert) for expert in w.parts)
        table = np.zeros((w.experts, width, PART_FIELDS), np.int64)
        for e, expert in enumerate(w.parts):
            for p, part in enumerate(expert):
                if part.instance not in number:
                    have = " ".join(map(str, number))
                    raise UnsupportedError(
                        f"pack: cpu has no instance {part.instance}; it has {have}"
                    )
                _check(part, w.columns)
                table[e, p] = (
                    part.rows,
                    number[part.instance],
                    part.group,
                    part.codes.shape[1] * part.codes.itemsize,
                    *buffers.place(part.codes),
                    *buffers.place(part.scale),
                    *buffers.place(part.bias),
                    *buffers.place(part.codebook),
                )
        tables.append((w, table))
    shared = tuple(buffers.arrays)
    packed = tuple(
        PackedWeight(table, shared, w.rows, w.columns, w.experts, w.rotation, w.in_features)
        for w, table in tables
    )
    return packed[0] if len(packed) == 1 else packed
