"""Launch plans of a weight times a prompt: cuda/qmatmul.cuh.

1. `schedule`, of experts: which tiles there are, so that no host has to know.
2. `tokens`: x as tensor cores read it, once for each order in which codes leave their bytes.
3. the product.
"""

from __future__ import annotations

from typing import NamedTuple

from .cuda_plan import NUMBERS, Launch
from .errors import UnsupportedError
from .gpu_plan import Output, Step
from .gpu_weight import ROTATED, GpuWeight, bits_of, scale_of, table_of

#: Pairs of an expert, or tokens, up to which x has three bytes: one or two tiles of 32, bound by
#: what they read of the weight. More have two, as fast as bf16, off by 1/32639 of the largest of
#: 128 columns, and tiles of 64.
FEW = 64
#: Bytes of shared memory of a block: GPUs for desktops have 99 KB, and one block with two stages of
#: 256 rows needs 60 to 98.
SHARED = 98304
_HEAD = 2048
#: Blocks that keep the largest GPU busy; with fewer, blocks of fewer rows are better.
_BUSY = 132
_NATURAL, _PAIRS, _, _GGUF, _HALVES, _BFLOATS = range(6)


def form_of(kind: int) -> int:
    """How records lie for parts of a kind: ``Order`` in cuda/codes.cuh and two more."""
    table, bits = table_of(kind), bits_of(kind)
    if table == "plain":
        return _HALVES if scale_of(kind) == "f16" else _BFLOATS
    if table == "e2m1_gguf":
        return _GGUF
    in_pairs = bits == 2 or (table in ("linear", "linear_signed") and bits == 4)
    return _PAIRS if in_pairs else _NATURAL


class _Shape(NamedTuple):
    planes: int
    tile: int  # tokens
    records: int  # of a token
    variants: list[tuple[int, bool]]  # form, whether x is read rotated from an array of its own

    @property
    def record(self) -> int:
        return 128 * self.planes + 32

    def places(self, turned: bool) -> int:
        """4 bits for each form: its number among the variants."""
        return sum(i << 4 * form for i, (form, t) in enumerate(self.variants) if t == turned)


def _shape(tokens: int, w: GpuWeight, slots: int, rotated: bool) -> _Shape:
    # 128 rows of 32 bits leave no room for 64 tokens
    full = any(table_of(kind) == "plain" and bits_of(kind) == 32 for kind in w.kinds)
    few = full or tokens * max(slots, 1) <= FEW * w.experts
    variants = sorted({(form_of(kind), rotated and bool(kind & ROTATED)) for kind in w.kinds})
    if len(variants) > 7:
        raise UnsupportedError(f"qmatmul: {len(variants)} kinds of records, on CUDA 7 at most")
    wide = 2 if any(form >= _HALVES for form, _ in variants) else 1
    return _Shape(3 if few else 2, 32 if few else 64, wide * -(-w.columns // 128), variants)


def _stage(shape: _Shape, kind: int, height: int) -> int:
    """Bytes of 128 columns of a tile's tokens and rows."""
    bits = bits_of(kind)
    pieces = bits // 2 if table_of(kind) == "plain" else bits
    size = shape.tile * (128 * shape.planes + 20) + height * (pieces | 1) * 16
    return -(-size // 1024) * 1024


def most_tiles(pairs: int, experts: int, tile: int) -> int:
    """Tiles of one expert's pairs that there can be."""
    return pairs // tile + min(pairs, experts)


def tokens_launch(
    tokens: int, w: GpuWeight, x_dtype: str, *, slots: int = 0, rotated: bool = False
) -> Launch:
    """``records``: x as `product_launch` reads it, ``[variants, tokens, records, bytes]``."""
    shape = _shape(tokens, w, slots, rotated)
    forms = sum((form | turned << 3) << 4 * i for i, (form, turned) in enumerate(shape.variants))
    size = (len(shape.variants), tokens, shape.records, shape.record)
    return Launch(
        "qmatmul_tokens",
        "qmatmul_prepare",
        (shape.planes,),
        {"x": True, "rotated": rotated},
        (Output("records", size, "int8"),),
        {
            "tokens": tokens,
            "columns": w.in_features if rotated else w.columns,
            "wide": w.columns,
            "per_token": shape.records,
            "forms": forms,
            "x_dtype": NUMBERS[x_dtype],
        },
        (-(-tokens * -(-w.columns // 128) // 8), len(shape.variants), 1),
        256,
        4096,
    )


def schedule(tokens: int, w: GpuWeight, slots: int) -> Launch:
    """``tiles`` of `qmatmul`; of the same pairs, weights with tiles of one size share them."""
    return schedule_launch(tokens * slots, w.experts, _shape(tokens, w, slots, False).tile)


def schedule_launch(pairs: int, experts: int, tile: int) -> Launch:
    """``tiles``: i32 ``[1 + most_tiles, 4]``, how many and then expert, first and end of each."""
    return Launch(
        "qmatmul_schedule",
        "qmatmul_prepare",
        (),
        {"expert": True},
        (Output("tiles", (1 + most_tiles(pairs, experts, tile), 4), "int32"),),
        {"pairs": pairs, "experts": experts, "most": tile},
        (1, 1, 1),
        256,
        32,
    )


def product_launch(
    tokens: int,
    w: GpuWeight,
    dtype: str,
    x_dtype: str,
    *,
    slots: int = 0,
    rotated: bool = False,
    residual: bool = False,
) -> Launch:
    """y of ``records``, and of ``order`` and ``tiles`` where there are experts."""
    shape, pairs = _shape(tokens, w, slots, rotated), tokens * max(slots, 1)
    tiles = most_tiles(pairs, w.experts, shape.tile) if slots else -(-pairs // shape.tile)
    for height in (256, 128):  # one or two warpgroups
        shared = _HEAD + 2 * max(_stage(shape, kind, height) for kind in w.kinds)
        if shared <= SHARED and w.blocks(height) * tiles >= _BUSY:
            break
    plain = [kind for kind in w.kinds if table_of(kind) == "plain"]
    same = {"float16": _HALVES, "bfloat16": _BFLOATS}.get(x_dtype)
    whole = all(form_of(k) == same and not (rotated and k & ROTATED) for k in plain)
    sizes = {
        "in": w.in_features if rotated else w.columns,
        "columns": w.columns,
        "rows": w.rows,
        "parts_each": w.parts.shape[1],
        "pairs": pairs,
        "slots": max(slots, 1),
        "per_token": shape.records,
        "variants": shape.places(False),
        "rotated": shape.places(rotated),
        "terms": 1 if whole else shape.planes,
        "y_dtype": NUMBERS[dtype],
    }
    inputs = {"records": True, "words": True, "parts": True}
    inputs |= {"order": slots > 0, "tiles": slots > 0, "residual": residual}
    out = (tokens, slots, w.rows) if slots else (tokens, w.rows)
    grid = (w.blocks(height), tiles, 1)
    constants = (shape.planes, shape.tile)
    outputs = (Output("y", out, dtype),)
    return Launch("qmatmul", "qmatmul", constants, inputs, outputs, sizes, grid, height, shared)


def qmatmul(
    tokens: int,
    w: GpuWeight,
    dtype: str,
    *,
    slots: int = 0,
    x_dtype: str | None = None,
    rotated: bool = False,
    residual: bool = False,
) -> list[Step]:
    """One weight for a prompt: launches over ``x`` ``[tokens, k]``; the last one's output is ``y``.

    With ``slots`` they read ``order``, i32 places of the pairs ``[t * slots]``, those of one expert
    side by side, and ``tiles``, of `schedule` and their experts in this order.

    Args:
        slots: experts of each token, 0 for a weight without experts.
        x_dtype: of x, if another than the result's.
        rotated: parts that want it read x rotated from another array, ``rotated``; else x is.
        residual: the result is added to an array of its shape.

    Raises:
        UnsupportedError: a weight of more than seven kinds of tables and rotations.
    """
    x_dtype = x_dtype or dtype
    records = tokens_launch(tokens, w, x_dtype, slots=slots, rotated=rotated)
    options = {"slots": slots, "rotated": rotated, "residual": residual}
    y = product_launch(tokens, w, dtype, x_dtype, **options)
    return [Step(records, "records"), Step(y, "y")]
