"""Launch plans of products: Hadamard rotation, rows as numbers, a weight times tokens."""

from __future__ import annotations

from . import cuda_tiles
from .cuda_plan import NUMBERS, Launch
from .errors import UnsupportedError
from .gpu_plan import Output, Step
from .gpu_weight import ROTATED, GpuWeight, bits_of, table_of
from .packed import rotated_columns

#: Numbers of a row that one block rotates, at most.
SPAN = 4096
THREADS = 256
#: How many tokens may read the codes together: more would leave no registers for two blocks.
TOGETHER = (1, 2, 4)
#: Tokens that `qmatvec` is for, at most.
FEW = 8
#: Bytes of shared memory of a block. More than the 48 KB that every launch may have: four tokens of
#: 4096 columns lie there as three bytes each, with their sums, and one rotated.
MEMORY = 96 << 10
#: Largest numbers, at most, that `largest` finds one after the other.
TOP = 64
# Blocks that work at once on the largest GPU: two on each of 132 multiprocessors. More would only
# lay the tokens again.
_BLOCKS = 264
# Numbers of a row that one block looks through.
_PIECE = 4096


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


def shared_bytes(together: int, columns: int, turned: int = 0) -> int:
    """Of a block that multiplies ``together`` tokens: `places_for` in cuda/planes.cuh.

    Args:
        turned: columns of a row that is rotated there, or 0.
    """
    blocks, rows = -(-columns // 256) * 2, 64 if together > 2 else 128
    return 128 + together * (768 + 36 * rows + 512 * blocks) + 4 * padded(turned)


def rows_at_once(kind: int, columns: int) -> int:
    """Rows of a part that a block's warps work on together: cuda/rows.cuh."""
    table = table_of(kind)
    if table == "plain":  # a row a warp
        return 8
    wide = (
        table == "codebook" and bits_of(kind) == 2 and (kind >> 25) % 4 == 0
    )  # `wide_of` in cuda/codes.cuh
    steps = -(-columns // (256 if wide else 128))
    return 16 * 8 // next(n for n in (8, 4, 2, 1) if steps >= n)


def block_rows(w: GpuWeight, groups: int) -> int:
    """Rows of a part for each block, where ``groups`` blocks have the same rows to do."""
    unit = max(rows_at_once(kind, w.columns) for kind in w.kinds)
    most = max(1, _BLOCKS // groups)
    height = unit
    while sum(-(-int(n) // height) for n in w.parts[0, :, 0]) > most:
        height += unit
    return height


def _together(tokens: int, w: GpuWeight, turned: int) -> int:
    """How many tokens share the codes: those whose planes fit, one for a codebook (rows.cuh)."""
    if any(table_of(kind) == "codebook" for kind in w.kinds):
        return 1
    wanted = _at_least(min(tokens, TOGETHER[-1]), TOGETHER)
    fits = [n for n in TOGETHER if shared_bytes(n, w.columns, turned) <= MEMORY]
    return min(wanted, max(fits, default=1))


def qmatvec(
    tokens: int,
    w: GpuWeight,
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
        rotate: parts that want it read x through the weight's rotation; else x has been through it.
        residual: the result is added to an array of its shape.

    Raises:
        UnsupportedError: more columns than a block's shared memory holds.
    """
    columns = w.in_features if rotate else w.columns
    turned = w.columns if rotate else 0
    together = 1 if slots else _together(tokens, w, turned)
    shared = shared_bytes(together, w.columns, turned)
    if shared > MEMORY:
        raise UnsupportedError(f"qmatvec: {w.columns} columns need {shared} bytes, has {MEMORY}")
    r = w.rotation
    signs = [*r.sign_counts.values()] if r and rotate else [0, 0]
    groups = -(-tokens // together) * max(slots, 1)
    height = block_rows(w, groups)
    return Launch(
        "qmatvec",
        "qmatvec",
        (together,),
        {
            "x": True,
            "gamma": norm is not None,
            "pre": signs[0] > 0,
            "post": signs[1] > 0,
            "words": True,
            "parts": True,
            "expert": slots > 0,
            "residual": residual,
        },
        (Output("y", (tokens, slots, w.rows) if slots else (tokens, w.rows), dtype),),
        {
            "in": columns,
            "columns": w.columns,
            "rows": w.rows,
            "part_count": w.parts.shape[1],
            "slots": max(slots, 1),
            "tokens": tokens,
            "height": height,
            "turns": int(rotate),
            "block": (r and r.block) or 0,
            "pres": signs[0] or 1,
            "posts": signs[1] or 1,
            "eps": float(norm or 0.0),
            "dtype": NUMBERS[dtype],
        },
        (groups, w.blocks(height), 1),
        THREADS,
        shared,
        w.kinds,
    )


def dequantize(count: int, w: GpuWeight, dtype: str) -> Launch:
    """``count`` rows of a weight as numbers ``[count, k]``; its rotation is not undone."""
    return Launch(
        "dequantize",
        "dequantize",
        (),
        {"index": True, "words": True, "parts": True},
        (Output("y", (count, w.columns), dtype),),
        {
            "columns": w.columns,
            "rows": w.rows,
            "experts": w.experts,
            "part_count": w.parts.shape[1],
            "dtype": NUMBERS[dtype],
        },
        (count, 1, 1),
        THREADS,
    )


def in_tiles(tokens: int, w: GpuWeight, slots: int) -> bool:
    """Whether tiles of tokens and rows are for these tokens, or `qmatvec`, which reads the codes
    once for every four tokens and takes pairs of a token and an expert one by one."""
    return tokens * slots >= 4 * w.experts if slots else tokens > FEW


def schedule(tokens: int, w: GpuWeight, slots: int) -> Launch:
    """What `product` needs of pairs in tiles, beside their order; its size ``most`` says which."""
    return cuda_tiles.schedule(tokens, w, slots)


def product(
    tokens: int,
    w: GpuWeight,
    dtype: str,
    *,
    slots: int = 0,
    norm: float | None = None,
    rotate: bool = False,
    residual: bool = False,
) -> list[Step]:
    """Launches of one weight for any number of tokens; arguments as in `qmatvec`.

    They read ``x``; the last one's output is ``y``. With `in_tiles` and ``slots`` they need what
    `cuda_tiles.qmatmul` does.
    """
    if in_tiles(tokens, w, slots):
        return _prompt(tokens, w, dtype, slots, norm, rotate, residual)
    steps: list[Step] = []
    if rotate and w.columns > SPAN:  # of which a block cannot rotate a row by itself
        if not all(kind & ROTATED for kind in w.kinds):
            raise UnsupportedError(f"qmatvec: {w.columns} columns, some parts rotated, others not")
        r = w.rotation
        shape = (tokens, w.in_features, dtype)
        steps = hadamard(*shape, block=r.block, norm=norm, to="x", **r.sign_counts)
        norm, rotate = None, False
    options = {"slots": slots, "norm": norm, "rotate": rotate, "residual": residual}
    return [*steps, Step(qmatvec(tokens, w, dtype, **options), "y")]


def _prompt(
    tokens: int,
    w: GpuWeight,
    dtype: str,
    slots: int,
    norm: float | None,
    rotate: bool,
    residual: bool,
) -> list[Step]:
    """`product` by tiles: x is normed and rotated before."""
    steps: list[Step] = []
    turned, x_dtype, r = [bool(k & ROTATED) for k in w.kinds], dtype, w.rotation
    if norm is not None and not (rotate and all(turned)):
        # H of one number: the norm alone
        shape = (tokens, w.in_features, "float32")
        steps = hadamard(*shape, block=1, pre=0, post=0, norm=norm, x_dtype=dtype, to="x")
        norm, x_dtype = None, "float32"
    if rotate:
        to, shape = "x" if all(turned) else "rotated", (tokens, w.in_features, "float32")
        steps += hadamard(*shape, block=r.block, norm=norm, x_dtype=x_dtype, to=to, **r.sign_counts)
        x_dtype = "float32" if all(turned) else x_dtype
    options = {"slots": slots, "x_dtype": x_dtype, "residual": residual}
    return steps + cuda_tiles.qmatmul(
        tokens, w, dtype, rotated=rotate and not all(turned), **options
    )


def largest(rows: int, columns: int, top: int) -> list[Launch]:
    """The ``top`` largest numbers of each row of ``x``, f32 ``[rows, columns]``, in launches until
    one block is left.

    Each writes ``values`` f32 and ``index`` i32 ``[rows, pieces * top]``, which are the next one's
    ``x`` and ``from``.
    """
    launches: list[Launch] = []
    while not launches or columns > top:
        pieces = -(-columns // _PIECE)
        shape = (rows, pieces * top)
        launches.append(
            Launch(
                "largest",
                "qmatmul_top",
                (),
                {"x": True, "from": bool(launches)},
                (Output("values", shape, "float32"), Output("index", shape, "int32")),
                {"columns": columns, "top": top},
                (pieces, rows, 1),
                THREADS,
            )
        )
        columns = pieces * top
    return launches
