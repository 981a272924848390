"""Launch plans of products: Hadamard rotation, rows as numbers, a weight times tokens."""

from __future__ import annotations

from .errors import UnsupportedError
from .gpu_plan import Output, Step
from .gpu_weight import ROTATED, GpuWeight, bits_of, table_of
from .metal_plan import THREADS, Launch, float_bits, null
from .packed import rotated_columns

#: Bytes of threadgroup memory of a group, at most.
MEMORY = 16384
#: Numbers of a row that one threadgroup rotates, at most.
SPAN = MEMORY // 4
#: Tokens that read the codes together, at most: their sums stay in registers.
TOKENS = 8
# What there is enough of to keep the largest GPU's 80 cores busy, more groups than that only repeat
# the rotation of x.
_GROUPS = 256


#: The file of every table.
_FILES = {
    "linear": "linear",
    "linear_signed": "linear",
    "e2m1": "e2m1",
    "e2m1_gguf": "e2m1",
    "codebook": "codebook",
    "plain": "plain",
}


def table_files(kinds: tuple[int, ...]) -> list[str]:
    """Stems of the files a kernel needs for parts of these kinds."""
    return list(dict.fromkeys(_FILES[table_of(kind)] for kind in kinds))


def lanes(columns: int, kind: int) -> int:
    """Lanes that share a row of a part: `lanes_of` in metal/rows.metal."""
    bits = bits_of(kind)
    piece = 64 if bits == 2 else 32 if bits < 8 else 16 if bits == 8 else 8
    n = 1
    while n < 32 and n * piece < columns:
        n *= 2
    return n


def shared_columns(columns: int) -> int:
    """Floats of threadgroup memory for a row: `padded` in metal/weight.metal."""
    return -(-columns // 32) * 32


def hadamard(
    rows: int,
    columns: int,
    dtype: str,
    *,
    block: int | None,
    pre: int,
    post: int,
    norm: float | None = None,
    to: str = "y",
) -> list[Step]:
    """`hadamoe.ops.hadamard` of ``x``, ``[rows, columns]``, after an RMSNorm where wanted.

    Args:
        pre, post: how many signs there are, 0 for none; a multiple of 8, or one for every column.
        norm: eps of the norm, or None.
        to: name of the result.

    Returns:
        One launch, or two for blocks longer than 4096.

    Raises:
        UnsupportedError: a norm of rows longer than 4096.
    """
    wide = rotated_columns(columns, block)
    if norm is not None and wide > SPAN:
        raise UnsupportedError(f"hadamard: a norm of {wide} columns, on Metal {SPAN} at most")
    span = min(wide, SPAN)
    threads = min(THREADS, max(32, span // 8 // 32 * 32))
    joined = (block or 1 << wide.bit_length() - 1) > SPAN
    constants = {"K": columns, "P": wide, "BLOCK": block or 0, "PRES": pre or 1}
    constants |= {"POSTS": 1 if joined else post or 1, "SPAN": span, "THREADS": threads}
    first = Launch(
        "hadamard",
        "hadamard",
        constants | {"EPS": float_bits(norm or 0.0)},
        {
            "x": None,
            "gamma": None if norm is not None else "float",
            "pre": None if pre else "float",
            "post": None if post and not joined else "float",
        },
        (Output("y", (rows, wide), "float32" if joined else dtype),),
        (rows, -(-wide // span), 1),
        threads,
        (("float", shared_columns(span)), ("float", threads // 32 if norm is not None else 0)),
    )
    if not joined:
        return [Step(first, to)]
    constants = {"P": wide, "BLOCK": block or 0, "POSTS": post or 1, "SPAN": SPAN}
    second = Launch(
        "hadamard_join",
        "hadamard",
        constants | {"THREADS": THREADS},
        {"pieces": None, "post": None if post else "float"},
        (Output("y", (rows, wide), dtype),),
        (rows, SPAN // THREADS, 1),
        THREADS,
    )
    return [Step(first, "pieces"), Step(second, to)]


def dequantize(count: int, w: GpuWeight, dtype: str) -> Launch:
    """``count`` rows of a weight as numbers ``[count, k]``; its rotation is not undone."""
    threads = 64
    constants = {
        "K": w.columns,
        "N": w.rows,
        "EXPERTS": w.experts,
        "PARTS": w.parts.shape[1],
        "THREADS": threads,
        **{f"KIND{i}": kind for i, kind in enumerate(w.kinds)},
    }
    return Launch(
        "dequantize",
        "+".join([*table_files(w.kinds), "dequantize"]),
        constants,
        {"index": None, "words": None, "parts": None},
        (Output("y", (count, w.columns), dtype),),
        (count, 1, 1),
        threads,
    )


def _fit(w: GpuWeight) -> int:
    """How many rotated tokens a group's memory holds, with their norms."""
    return MEMORY // (4 * shared_columns(w.columns) + THREADS // 8)


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
    """
    fit = max(_fit(w), 1) if rotate else TOKENS
    together = 1 if slots else min(tokens, TOKENS, fit)
    columns = w.in_features if rotate else w.columns
    rows = 4 if together <= 4 else 2
    height = rows * 32 // min(lanes(min(columns, w.columns), kind) for kind in w.kinds)
    blocks = w.blocks(height)
    # without a rotation nothing is shared, and small groups are placed best
    threads = min(THREADS if rotate else 64, 32 * blocks)
    groups = -(-32 * blocks // threads)
    passes = max(1, min(8, groups // _GROUPS)) if rotate else 1
    constants = {
        "IN": columns,
        "K": w.columns,
        "N": w.rows,
        "PARTS": w.parts.shape[1],
        "SLOTS": max(slots, 1),
        "COUNT": tokens if tokens % together else 0,
        "TOKENS": together,
        "ROWS": rows,
        "HEIGHT": height,
        "PASSES": passes,
        "THREADS": threads,
        "EPS": float_bits(norm or 0.0),
    }
    inputs: dict[str, str | None] = {"x": None, "gamma": None if norm is not None else "float"}
    shared: tuple[tuple[str, int], ...] = ()
    if rotate:
        r = w.rotation
        signs = [*r.sign_counts.values()]
        constants |= {"BLOCK": r.block or 0, "PRES": signs[0] or 1, "POSTS": signs[1] or 1}
        inputs |= {"pre": None if signs[0] else "float", "post": None if signs[1] else "float"}
        partial = together * threads // 32 if norm is not None else 0
        shared = (("float", together * shared_columns(w.columns)), ("float", partial))
    inputs |= {
        "words": None,
        "parts": None,
        "expert": None if slots else "int",
        "residual": None if residual else null(dtype),
    }
    name = "qmatvec_rotated" if rotate else "qmatvec"
    shape = (tokens, slots, w.rows) if slots else (tokens, w.rows)
    return Launch(
        name,
        "+".join([*table_files(w.kinds), name]),
        constants | {f"KIND{i}": kind for i, kind in enumerate(w.kinds)},
        inputs,
        (Output("y", shape, dtype),),
        (-(-groups // passes), -(-tokens // together) * max(slots, 1), 1),
        threads,
        shared,
    )


def qmatmul(
    pairs: int,
    w: GpuWeight,
    dtype: str,
    *,
    slots: int = 0,
    rotated: bool = False,
    residual: bool = False,
) -> Launch:
    """One weight for a prompt, by tiles.

    Inputs ``order`` and ``expert`` with ``slots``: places of the pairs ``[t * slots]`` and their
    experts, ascending; ``count``: i32 ``[1]``, the number of pairs, or of tokens without slots.

    Args:
        pairs: of a token and an expert; tokens where there are no experts.
        slots: experts of each token, 0 for a weight without experts.
        rotated: parts that want it read x rotated from another array, ``rotated``; else x is.
    """
    most = 64 if pairs > 32 and not slots else 32  # pairs of a tile meet many experts
    constants = {
        "IN": w.in_features if rotated else w.columns,
        "K": w.columns,
        "N": w.rows,
        "PARTS": w.parts.shape[1],
        "SLOTS": max(slots, 1),
        "MOST": most,
    }
    inputs = {
        "x": None,
        "rotated": None if rotated else "float",
        "words": None,
        "parts": None,
        "order": None if slots else "int",
        "expert": None if slots else "int",
        "count": None,
        "residual": None if residual else null(dtype),
    }
    shape = (pairs // slots, slots, w.rows) if slots else (pairs, w.rows)
    blocks = w.blocks(32)
    return Launch(
        "qmatmul",
        "+".join([*table_files(w.kinds), "qmatmul"]),
        constants | {f"KIND{i}": kind for i, kind in enumerate(w.kinds)},
        inputs,
        (Output("y", shape, dtype),),
        (blocks, -(-pairs // most), 1),
        128,
        (("float", (most + 32) * 36),),
    )


def in_tiles(tokens: int, w: GpuWeight, slots: int) -> bool:
    """Whether `qmatmul` is for these tokens, or `qmatvec`.

    `qmatvec` reads the codes once for 8 tokens and is bound by memory up to there; MLX changes at
    10 to 18. Pairs go through it one by one: a tile is better once it holds several pairs of one
    expert. MLX asks for 4.
    """
    return tokens * slots >= 4 * w.experts if slots else tokens > TOKENS


def schedule(tokens: int, w: GpuWeight, slots: int) -> None:
    """None: a tile finds its experts itself."""


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

    They read ``x``; the last one's output is ``y``. With `in_tiles` they need what `qmatmul` does.
    """
    tiles = in_tiles(tokens, w, slots)
    turned = [bool(k & ROTATED) for k in w.kinds]
    # groups that rotate for themselves would read the codes for fewer tokens than they could
    inside = (tokens == 1 and w.columns <= SPAN) or min(tokens, TOKENS) <= _fit(w)
    steps: list[Step] = []
    if norm is not None and tiles and not (rotate and all(turned)):
        # H of one number: the norm alone
        steps = hadamard(
            tokens, w.in_features, "float32", block=1, pre=0, post=0, norm=norm, to="x"
        )
        norm = None
    apart = rotate and (tiles or (not inside and all(turned)))
    if apart:
        r = w.rotation
        to = "rotated" if tiles and not all(turned) else "x"
        shape = (tokens, w.in_features, "float32")
        steps += hadamard(*shape, block=r.block, norm=norm, to=to, **r.sign_counts)
        norm = None
    options = {"slots": slots, "residual": residual}
    if tiles:
        rotated = apart and not all(turned)
        last = qmatmul(tokens * max(slots, 1), w, dtype, rotated=rotated, **options)
    else:
        last = qmatvec(tokens, w, dtype, norm=norm, rotate=rotate and not apart, **options)
    return [*steps, Step(last, "y")]


#: Numbers of a row that one group looks through.
_PIECE = 4096
#: Largest numbers, at most, that `largest` finds one after the other.
TOP = 64


def largest(rows: int, columns: int, top: int) -> list[Launch]:
    """The ``top`` largest numbers of each row of ``x``, f32 ``[rows, columns]``, in launches until
    one group is left.

    Each writes ``values`` f32 and ``index`` i32 ``[rows, pieces * top]``, which are the next one's
    ``x`` and ``from``.
    """
    launches: list[Launch] = []
    while not launches or columns > top:
        pieces = -(-columns // _PIECE)
        constants = {"N": columns, "PIECE": _PIECE, "TOP": top, "THREADS": THREADS}
        shape = (rows, pieces * top)
        launches.append(
            Launch(
                "largest",
                "qmatmul_top",
                constants,
                {"x": None, "from": None if launches else "int"},
                (Output("values", shape, "float32"), Output("index", shape, "int32")),
                (pieces, rows, 1),
                THREADS,
                (("float", THREADS // 16), ("uint", THREADS // 16)),
            )
        )
        columns = pieces * top
    return launches
