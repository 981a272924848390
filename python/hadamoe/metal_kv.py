"""Launch plans of the quantized KV cache: pages to codes and back, scores, attention over pages."""

from __future__ import annotations

import numpy as np

from .kv import CODECS, PAGE, page_bytes
from .metal_plan import THREADS, Launch, Output, float_bits

_ROTATED = ("h", "t")  # first letters of codecs that turn rows


def rotated(codec: str) -> bool:
    """Whether pages of a codec hold rows through signs and a Hadamard transform."""
    return codec[0] in _ROTATED


def _our_bits(codec: str) -> int:
    """Bits of a code of ours, else 0."""
    return int(codec[1:]) if codec[0] == "h" else 0


def code_bytes(codec: str, d: int) -> int:
    """Bytes of the codes of a page, where its scales begin."""
    bits = 16 if codec == "bf16" else 8 if codec == "fp8" else int(codec[-1])
    return PAGE * d * bits // 8


def _root(d: int) -> int:
    return float_bits(float(np.float32(1 / np.sqrt(d))))


def encode(pages: int, codec: str, side: str, d: int, scale: float = 1.0) -> Launch:
    """`kv_ops.kv_encode`: rows ``[pages, 64, d]`` of any float dtype to u8 ``[pages, bytes]``.

    Arrays: rows; signs f32 ``[d]`` of codecs that rotate; book f32 ``[16]``: a turbo codec's.
    """
    kivi_keys = codec.startswith("kivi") and side == "key"
    tokens = 32 if kivi_keys or codec == "h3" else 32 // _our_bits(codec) if _our_bits(codec) else 4
    sizes = {"CODEC": CODECS[codec], "VALUES": int(side == "value"), "PAGES": pages, "D": d}
    sizes["THREADS"] = threads = min(THREADS, 32 * pages * PAGE // tokens)
    inputs: dict[str, str | None] = {"rows": None}
    if rotated(codec):
        inputs["signs"] = None
        sizes["ROOT"] = _root(d)
    else:
        sizes["SCALE"] = float_bits(scale)
    kernel = "kv_encode" if _our_bits(codec) else "kv_encode_linear"
    if codec.startswith("turbo"):
        kernel = "kv_encode_turbo"
        inputs["book"] = None
        del sizes["VALUES"]
    order = ("CODEC", "VALUES", "PAGES", "D", "ROOT", "SCALE", "THREADS")
    return Launch(
        kernel,
        kernel,
        {name: sizes[name] for name in order if name in sizes},
        inputs,
        (Output("pages", (pages, page_bytes(codec, d)), "uint8"),),
        (-(-32 * pages * PAGE // tokens // threads), 1, 1),
        threads,
    )


def decode(
    pages: int, codec: str, side: str, d: int, dtype: str = "float32", scale: float = 1.0
) -> Launch:
    """`kv_ops.kv_decode`: u8 ``[pages, bytes]`` to rows ``[pages, 64, d]``; arrays as there."""
    threads = min(THREADS, 32 * pages * PAGE // 4)
    constants = {
        "CODEC": CODECS[codec],
        "VALUES": int(side == "value"),
        "PAGES": pages,
        "D": d,
        "SCALE": float_bits(scale),
        "ROOT": _root(d),
        "THREADS": threads,
    }
    inputs = {
        "pages": None,
        "signs": None if rotated(codec) else "float",
        "book": None if codec.startswith("turbo") else "float",
    }
    return Launch(
        "kv_decode",
        "kv_decode",
        constants,
        inputs,
        (Output("rows", (pages, PAGE, d), dtype),),
        (-(-32 * pages * PAGE // 4 // threads), 1, 1),
        threads,
    )


def scores(rows: int, pages: int, codec: str, d: int) -> Launch:
    """`kv_ops.kv_scores` of q ``[rows, d]`` and u8 ``[pages, bytes]``."""
    constants = {"CODEC": CODECS[codec], "D": d, "ROWS": rows, "PAGES": pages, "ROOT": _root(d)}
    outputs = (
        Output("q8", (rows, d), "int8"),
        Output("unit", (rows,), "float32"),
        Output("scores", (rows, pages * PAGE), "int32"),
    )
    inputs = {"q": None, "pages": None, "signs": None}
    groups = (-(-pages // 8), -(-rows // 8), 1)
    return Launch(
        "kv_scores", "kv_scores", constants, inputs, outputs, groups, THREADS, (("float4", 2 * d),)
    )
