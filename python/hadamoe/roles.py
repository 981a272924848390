"""The weights of ops made of several products, packed together under the names of their roles."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

from .errors import ContractError
from .packed import PackedWeight, pack, rotated_columns
from .weight import Rotation, Weight


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class RoleWeights:
    """Matrices of one op, packed with shared buffers.

    Weights that carry a rotation share it: ``hidden`` for those that read the hidden state,
    ``inner`` for those that read what is computed from it.
    """

    #: roles that read the inner state
    INNER = ()

    @classmethod
    def of(cls, **weights: Weight) -> Self:
        """Pack the weights, given by their roles, together.

        Raises:
            ContractError: a role is missing or unknown, widths do not fit, or weights of one input
                have different rotations.
        """
        op, names = cls.__name__, tuple(f.name for f in fields(cls))
        if weights.keys() != set(names):
            raise ContractError(f"{op}.of: has {sorted(weights)}, needs {sorted(names)}")
        packed = cls(*pack(*(weights[name] for name in names)))
        for name, w in zip(names, packed.roles, strict=True):
            needs = packed.inner_size(name) if name in cls.INNER else packed.hidden_size
            needs = rotated_columns(needs, w.rotation.block) if w.rotation else needs
            if w.columns != needs:
                raise ContractError(f"{op}.of: {name} has k={w.columns}, needs {needs}")
        packed.hidden, packed.inner  # noqa: B018  both raise where rotations differ
        return packed

    @property
    def roles(self) -> tuple[PackedWeight, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))

    @property
    def buffers(self) -> tuple[Any, ...]:
        """The u8 arrays all roles share."""
        return self.roles[0].buffers

    @property
    def hidden_size(self) -> int:
        """Columns of the hidden state: rows of what writes it."""
        return getattr(self, self.INNER[0]).rows

    def inner_size(self, role: str) -> int:
        """Columns, before padding, of what an inner role reads."""
        raise NotImplementedError

    @property
    def hidden(self) -> Rotation | None:
        """Rotation of the hidden state, for the weights that want one."""
        return self._shared(*(f.name for f in fields(self) if f.name not in self.INNER))

    @property
    def inner(self) -> Rotation | None:
        """Rotation of the inner state."""
        return self._shared(*self.INNER)

    def _shared(self, *names: str) -> Rotation | None:
        found = {r for name in names if (r := getattr(self, name).rotation) is not None}
        if len(found) > 1:
            raise ContractError(
                f"{type(self).__name__}: weights of one input have different rotations, needs one"
            )
        return found.pop() if found else None

    def arguments(self, *first: int) -> tuple[list[Any], list[Any], list[int]]:
        """(signs, parts tables, integers) of the native op, in its order; ``first`` are its own."""
        hidden, inner = self.hidden, self.inner
        signs = [s for r in (hidden, inner) for s in ((r.pre, r.post) if r else (None, None))]
        blocks = [-1 if r is None else r.block or 0 for r in (hidden, inner)]
        mask = sum(1 << i for i, w in enumerate(self.roles) if w.rotation is not None)
        return signs, [w.parts for w in self.roles], [*map(int, first), *blocks, mask]


@dataclass(frozen=True, slots=True, eq=False)
class MoeWeights(RoleWeights):
    """The six matrices of one mixture-of-experts block.

    ``gate_up`` and ``shared_gate_up`` hold gate rows, then up rows.
    """

    router: PackedWeight
    gate_up: PackedWeight
    down: PackedWeight
    shared_gate_up: PackedWeight
    shared_down: PackedWeight
    shared_gate: PackedWeight

    INNER = ("down", "shared_down")

    def inner_size(self, role: str) -> int:
        return (self.gate_up if role == "down" else self.shared_gate_up).rows // 2


@dataclass(frozen=True, slots=True, eq=False)
class AttentionWeights(RoleWeights):
    """The four matrices of gated attention; ``q`` holds, per head, q rows and then gate rows."""

    q: PackedWeight
    k: PackedWeight
    v: PackedWeight
    o: PackedWeight

    INNER = ("o",)

    def inner_size(self, role: str) -> int:
        return self.q.rows // 2


@dataclass(frozen=True, slots=True, eq=False)
class DeltaWeights(RoleWeights):
    """The five matrices of a Gated DeltaNet layer."""

    qkv: PackedWeight
    z: PackedWeight
    b: PackedWeight
    a: PackedWeight
    out: PackedWeight

    INNER = ("out",)

    def inner_size(self, role: str) -> int:
        return self.z.rows
