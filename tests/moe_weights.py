"""Mixtures of experts as the five published checkpoints store them, at any size."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from hadamoe.reference import widen
from hadamoe.verify.samples import random_weight, to_storage
from hadamoe.weight import Instance, Rotation, Weight, fuse_rows, stack_experts

BF16, F16 = Instance("plain", 16, "bf16"), Instance("plain", 16, "f16")


class Stored(NamedTuple):
    """How one role is stored; group 0: a scale a row."""

    instance: Instance
    group: int


class Layer(NamedTuple):
    """How a layer of a checkpoint stores its experts, its shared expert and its router."""

    gate_up: Stored
    down: Stored
    shared_gate_up: Stored
    shared_down: Stored
    router: Stored
    shared_gate: Stored
    rotation: str = ""  # "rows": JANGTQ's; "blocks": TQ's, of the shared expert too


def _affine(bits: int, scale: str = "bf16") -> Stored:
    return Stored(Instance("linear", bits, scale), 64)


_JANG = (_affine(8, "f16"), _affine(8, "f16"), Stored(F16, 0), Stored(F16, 0), "rows")
_TQ3, _TQ4 = (Stored(Instance("codebook", bits, "f32"), 128) for bits in (3, 4))
_DENSE = (Stored(BF16, 0),) * 4
#: hadamoe.synth.tables has the whole files.
LAYERS = {
    "config-i": Layer(*(_affine(2), _affine(3)) * 2, Stored(BF16, 0), Stored(BF16, 0)),
    "config-i ends": Layer(*(_affine(8),) * 4, Stored(BF16, 0), Stored(BF16, 0)),
    "tq-apex2": Layer(_TQ3, _TQ4, _TQ3, _TQ4, Stored(F16, 0), _TQ3, "blocks"),
    "jangtq2": Layer(*(Stored(Instance("codebook", 2, "f16"), 0),) * 2, *_JANG),
    "jangtq4": Layer(*(Stored(Instance("codebook", 4, "f16"), 0),) * 2, *_JANG),
    "mxfp4": Layer(
        *(Stored(Instance("e2m1", 4, "e8m0"), 32), _affine(5)) * 2, _affine(8), _affine(8)
    ),
    "w4a16": Layer(*(Stored(Instance("linear_signed", 4, "bf16"), 32),) * 2, *_DENSE),
    "w4a16 ends": Layer(*(Stored(BF16, 0),) * 2, *_DENSE),
}


def matrix(rng, stored: Stored, rows: int, columns: int) -> Weight:
    """Gaussian rows, scaled so that a product has about its input's size."""
    inst, group = stored
    w = random_weight(rng, inst, rows, columns, group=group or columns, kind="gaussian")
    if inst.table != "linear" or inst.bits <= 4:
        return w
    part = w.parts[0][0]  # more bits, larger codes: smaller scales
    scale, bias = (
        to_storage(widen(a, inst.scale) / 2 ** (inst.bits - 4), inst.scale)
        for a in (part.scale, part.bias)
    )
    return replace(w, parts=((replace(part, scale=scale, bias=bias),),))


def rotations(rng, kind: str, hidden: int, inner: int) -> tuple[Rotation | None, Rotation | None]:
    def signs(n: int) -> np.ndarray:
        return rng.choice(np.float32([-1, 1]), n)

    if kind == "rows":
        return Rotation(None, signs(hidden)), Rotation(None, signs(inner))
    if kind == "blocks":
        return (Rotation(128, signs(128), signs(128)),) * 2
    return None, None


def moe(
    rng, name: str, *, hidden: int = 256, inner: int = 128, experts: int = 6, distinct: int = 0
) -> dict[str, Weight]:
    """The six weights of a layer by role.

    Args:
        name: of `LAYERS`.
        distinct: how many experts differ, the others repeat them; 0 for all.
    """
    layer = LAYERS[name]
    turns = rotations(rng, layer.rotation, hidden, inner)
    every = layer.rotation == "blocks"

    def pair(stored: Stored) -> Weight:
        return fuse_rows([matrix(rng, stored, inner, hidden) for _ in range(2)])

    def stack(make) -> Weight:
        few = [make() for _ in range(distinct or experts)]
        return stack_experts([few[e % len(few)] for e in range(experts)])

    def turned(w: Weight, by: Rotation | None) -> Weight:
        return replace(w, rotation=by)

    shared = turns if every else (None, None)
    return {
        "router": matrix(rng, layer.router, experts, hidden),
        "gate_up": turned(stack(lambda: pair(layer.gate_up)), turns[0]),
        "down": turned(stack(lambda: matrix(rng, layer.down, hidden, inner)), turns[1]),
        "shared_gate_up": turned(pair(layer.shared_gate_up), shared[0]),
        "shared_down": turned(matrix(rng, layer.shared_down, hidden, inner), shared[1]),
        "shared_gate": turned(matrix(rng, layer.shared_gate, 1, hidden), shared[0]),
    }


def nbytes(weight: Weight, experts: int) -> int:
    """Bytes of so many experts."""
    arrays = [
        a for p in weight.parts[0] for a in (p.codes, p.scale, p.bias, p.codebook) if a is not None
    ]
    return experts * sum(a.nbytes for a in arrays)


def read_by_launch(moe: dict[str, Weight], top_k: int) -> list[int]:
    """Bytes that each of the three launches for a token needs."""
    launches = (
        {"router": 1, "shared_gate": 1},
        {"gate_up": top_k, "shared_gate_up": 1},
        {"down": top_k, "shared_down": 1},
    )
    return [sum(nbytes(moe[role], n) for role, n in roles.items()) for roles in launches]
