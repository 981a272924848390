"""Launch plans of products: Hadamard rotation, rows as numbers, a weight times tokens."""

from __future__ import annotations

from .cuda_plan import NUMBERS, Launch
from .errors import UnsupportedError
from .gpu_plan import Output, Step
from .packed import rotated_columns

#: Numbers of a row that one block rotates, at most.
SPAN = 4096
THREADS = 256


def padded(columns: int) -> int:
    """Floats of shared memory for a rotated row: `padded` in cuda/rotate.cuh."""
    return -(-columns // 32) * 32


def _at_least(count: int, compiled: tuple[int, ...]) -> int:
    """The smallest compiled size that is enough."""
    return next(n for n in compiled if n >= count)


def hadamard(
    rows: int,
    columns: int,
    dtype: str,
    *,
    block: int | None,
    pre: int,
    post: int,
    norm: float | None = None,
    x_dtype: str | None = None,
    to: str = "y",
) -> list[Step]:
    """`hadamoe.ops.hadamard` of ``x``, ``[rows, columns]``, after an RMSNorm where wanted.

    Args:
        dtype: of the result; x_dtype: of x, if another.
        pre, post: how many signs there are, 0 for none; a multiple of 8, or one for every column.
        norm: eps of the norm, or None.
        to: name of the result.

    Returns:
        One launch, or two for blocks longer than 4096.

    Raises:
        UnsupportedError: a norm of rows longer than 4096, or rows longer than 65536.
    """
    wide = rotated_columns(columns, block)
    if norm is not None and wide > SPAN:
        raise UnsupportedError(f"hadamard: a norm of {wide} columns, on CUDA {SPAN} at most")
    if wide > 16 * SPAN:
        raise UnsupportedError(f"hadamard: {wide} columns, on CUDA {16 * SPAN} at most")
    span = min(wide, SPAN)
    joined = (block or 1 << wide.bit_length() - 1) > SPAN
    pieces = "float32" if joined else dtype
    first = Launch(
        "hadamard",
        "hadamard",
        (_at_least(-(-span // 256), (1, 2, 4, 8, 16)),),
        {
            "x": True,
            "gamma": norm is not None,
            "pre": pre > 0,
            "post": post > 0 and not joined,
        },
        (Output("y", (rows, wide), pieces),),
        {
            "columns": columns,
            "wide": wide,
            "block": block or 0,
            "pres": pre or 1,
            "posts": post or 1,
            "span": span,
            "eps": float(norm or 0.0),
            "x_dtype": NUMBERS[x_dtype or dtype],
            "y_dtype": NUMBERS[pieces],
        },
        (rows, -(-wide // span), 1),
        min(THREADS, max(32, -(-span // 256) * 32)),
        4 * (padded(span) + THREADS // 32),
    )
    if not joined:
        return [Step(first, to)]
    second = Launch(
        "hadamard_join",
        "hadamard",
        (_at_least(-(-wide // SPAN), (4, 16)),),
        {"pieces": True, "post": post > 0},
        (Output("y", (rows, wide), dtype),),
        {
            "wide": wide,
            "block": block or 0,
            "posts": post or 1,
            "span": SPAN,
            "y_dtype": NUMBERS[dtype],
        },
        (rows, SPAN // THREADS, 1),
        THREADS,
    )
    return [Step(first, "pieces"), Step(second, to)]
