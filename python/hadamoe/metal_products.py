"""Launch plans of products: Hadamard rotation, a weight times a few tokens."""

from __future__ import annotations

from .metal_plan import THREADS, Launch, Output, float_bits, null
from .metal_weight import MetalWeight
from .packed import rotated_columns


def _lanes(columns: int) -> int:
    """Lanes that share a row: 32 columns each at once, all 32 from 1,024 columns on."""
    lanes = 1
    while lanes < 32 and lanes * 32 < columns:
        lanes *= 2
    return lanes


def hadamard(
    rows: int, columns: int, dtype: str, *, block: int | None, pre: int, post: int
) -> Launch:
    """`hadamoe.ops.hadamard` of ``[rows, columns]``; pre, post: how many signs, 0 for none."""
    wide = rotated_columns(columns, block)
    threads = min(THREADS, max(32, wide // 4 // 32 * 32))
    return Launch(
        "hadamard",
        "hadamard",
        {
            "K": columns,
            "P": wide,
            "BLOCK": block or 0,
            "PRES": pre,
            "POSTS": post,
            "THREADS": threads,
        },
        {"x": None, "pre": None if pre else "float", "post": None if post else "float"},
        (Output("y", (rows, wide), dtype),),
        (rows, 1, 1),
        threads,
        (("float", wide),),
    )


def qmatvec(
    tokens: int,
    w: MetalWeight,
    dtype: str,
    *,
    slots: int = 0,
    norm: float | None = None,
    rotate: bool = False,
    residual: bool = False,
) -> Launch:
    """One weight for a few tokens.

    Args:
        tokens: t.
        slots: experts of each token, 0 for a weight without experts.
        norm: eps of the RMSNorm that x goes through first, or None.
        rotate: x goes through the weight's rotation (else it has been, or there is none).
        residual: the result is added to an array of its shape.
    """
    lanes, rows = _lanes(w.columns), 4
    height = rows * (32 // lanes)
    blocks = max(sum(-(-int(n) // height) for n in expert[:, 0]) for expert in w.parts)
    threads = min(THREADS, 32 * blocks)
    r = w.rotation if rotate else None
    signs = [0 if r is None or s is None else len(s) for s in ((r and r.pre), (r and r.post))]
    constants = {
        "IN": w.in_features if r else w.columns,
        "K": w.columns,
        "N": w.rows,
        "PARTS": w.parts.shape[1],
        "SLOTS": max(slots, 1),
        "LANES": lanes,
        "ROWS": rows,
        "THREADS": threads,
        "BLOCK": -1 if r is None else r.block or 0,
        "PRES": signs[0],
        "POSTS": signs[1],
        "EPS": float_bits(norm or 0.0),
        **{f"KIND{i}": kind for i, kind in enumerate(w.kinds)},
    }
    inputs = {
        "x": None,
        "gamma": None if norm is not None else "float",
        "pre": None if signs[0] else "float",
        "post": None if signs[1] else "float",
        "words": None,
        "parts": None,
        "expert": None if slots else "int",
        "residual": None if residual else null(dtype),
    }
    shape = (tokens, slots, w.rows) if slots else (tokens, w.rows)
    groups = (-(-32 * blocks // threads), tokens * max(slots, 1), 1)
    shared = (("float", w.columns if r else 1), ("float", threads // 32))
    return Launch(
        "qmatvec",
        "qmatvec",
        constants,
        inputs,
        (Output("y", shape, dtype),),
        groups,
        threads,
        shared,
    )
