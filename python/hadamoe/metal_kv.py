"""Launch plans of the quantized KV cache: pages to codes and back, scores, attention over pages."""

from __future__ import annotations

import numpy as np

from .gpu_kv import Heads, noise, our_bits, rotated, worth
from .gpu_plan import Output
from .kv import CODECS, PAGE, KVFormat, page_bytes
from .metal_plan import THREADS, Launch, float_bits


def code_bytes(codec: str, d: int) -> int:
    """Bytes of the codes of a page, where its scales begin."""
    bits = 16 if codec == "bf16" else 8 if codec == "fp8" else int(codec[-1])
    return PAGE * d * bits // 8


def _root(d: int) -> int:
    return float_bits(float(np.float32(1 / np.sqrt(d))))


def encode(
    pages: int, codec: str, side: str, d: int, scale: float = 1.0, dtype: str = "float32"
) -> Launch:
    """`kv_ops.kv_encode`: rows ``[pages, 64, d]``, whatever their dtype, to u8 ``[pages, bytes]``.

    Arrays: rows; signs f32 ``[d]`` of codecs that rotate; book f32 ``[16]``: a turbo codec's.
    """
    kivi_keys = codec.startswith("kivi") and side == "key"
    tokens = 32 if kivi_keys or codec == "h3" else 32 // our_bits(codec) if our_bits(codec) else 4
    sizes = {"CODEC": CODECS[codec], "VALUES": int(side == "value"), "PAGES": pages, "D": d}
    sizes["THREADS"] = threads = min(THREADS, 32 * pages * PAGE // tokens)
    inputs: dict[str, str | None] = {"rows": None}
    if rotated(codec):
        inputs["signs"] = None
        sizes["ROOT"] = _root(d)
    else:
        sizes["SCALE"] = float_bits(scale)
    kernel = "kv_encode" if our_bits(codec) else "kv_encode_linear"
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
    constants = {"BITS": our_bits(codec), "D": d, "ROWS": rows, "PAGES": pages, "ROOT": _root(d)}
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


def prepare(
    heads: Heads,
    tokens: int,
    rot: int,
    q_dtype: str,
    kv_dtype: str,
    *,
    eps: float | None,
    stretch: float = 1.0,
) -> Launch:
    """RMSNorm and positions of queries and keys of a projection ``[b, t, (2 h + 2 g) d]``.

    Arrays: proj; q_norm, k_norm f32 ``[d]`` unless eps is None; freqs f32 ``[rot / 2]``, radians a
    position; signs of the keys' codec; offsets i32 ``[b]``: positions before; dims i32: t.

    Args:
        rot: columns that positions turn.
        stretch: what YaRN multiplies cosines and sines with.
    """
    b, h, g, d, form, _ = heads
    coded = form is not None
    turned = coded and rotated(form.key)
    simds = 8 if d <= 256 else 4
    constants = {
        "B": b,
        "H": h,
        "KV": g,
        "D": d,
        "ROT": rot,
        "EPS": float_bits(eps or 0.0),
        "STRETCH": float_bits(stretch),
        "CODED": int(coded and bool(our_bits(form.key))),
        "TURNED": int(turned),
        "WORTH": float_bits(worth(form.key, d, heads.scales[0])) if coded else 0,
        "ROOT": _root(d),
        "SIMDS": simds,
    }
    absent = None if eps is not None else "float"
    inputs = {"proj": None, "q_norm": absent, "k_norm": absent}
    inputs |= {"freqs": None if rot else "float", "signs": None if turned else "float"}
    inputs |= {"offsets": None, "dims": None}
    outputs = [
        Output("q", (b, h, tokens, d), q_dtype),
        Output("kv", (2, b, g, tokens, d), kv_dtype),
    ]
    if coded:
        outputs.append(Output("x", (b, h, tokens, d), heads.query_dtype))
        outputs.append(Output("factors", (b, h, tokens), "float32"))
    groups = (-(-b * tokens * (h + 2 * g) // simds), 1, 1)
    return Launch(
        "attention",
        "attention",
        constants,
        inputs,
        tuple(outputs),
        groups,
        32 * simds,
        (("float", simds * d),),
    )


def _kind(codec: str) -> int:
    """A codec as attention's kernels are told it: its number and the bits of a code."""
    return 32 * CODECS[codec] + code_bytes(codec, 32) // (4 * PAGE)


def _files(form: KVFormat) -> str:
    """Where attention over these codecs is."""
    family = {"h": "", "t": "_turbo", "a": "_line", "k": "_line", "f": "_plain", "b": "_plain"}
    key, value = (family[codec[0]] for codec in form)
    return f"kv_keys{key}+kv_values{value}+kv_runs"


def runs(heads: Heads, count: int, skip: int, table: bool = False) -> Launch:
    """Attention of one token over ``count`` runs of 8 coded pages each.

    Arrays: x, factors of `prepare`; key_pages, value_pages u8 ``[b, g, m, bytes]``, page p at
    p - skip, or ``[places, g, bytes]`` with a table i32 ``[b, m]`` of places; book f32 ``[32]``,
    centroids of turbo keys and values; lengths i32 ``[b]``, this token counted; dims i32: m, count.
    """
    b, h, g, d, form, _ = heads
    group = h // g
    most = 8 if d <= 256 else 4
    rows = max(n for n in range(1, most + 1) if group % n == 0)
    fours = -(-rows // 4)
    constants = {
        "KEY": _kind(form.key),
        "VALUE": _kind(form.value),
        "KV": g,
        "HEADS": group,
        "R": rows,
        "D": d,
        "SKIP": skip,
        "KEY_WORDS": page_bytes(form.key, d) // 4,
        "VALUE_WORDS": page_bytes(form.value, d) // 4,
        "WORTH": float_bits(worth(form.value, d, heads.scales[1])),
        "EACH": 2 if form.value.startswith("affine") else -(-d // THREADS),
    }
    turbo = any(codec.startswith("turbo") for codec in form)
    inputs = dict.fromkeys(("x", "factors", "key_pages", "value_pages"))
    inputs |= {"table": None if table else "int"}
    inputs |= {"book": None if turbo else "float", "lengths": None, "dims": None}
    outputs = (
        Output("parts", (b, g, count, group, d), "float32"),
        Output("sums", (b, g, count, group, 4), "float32"),
    )
    shared = (("float4", max(d, 256) * fours), *[("float4", 8 * fours)] * 4)
    groups = (count, g * (group // rows), b)
    return Launch("kv_runs", _files(form), constants, inputs, outputs, groups, THREADS, shared)


def join(heads: Heads, coded: bool, gate: int, dtype: str) -> Launch:
    """The rest of it: runs, page 0 and the own page to y ``[b, h d]``.

    Arrays: q ``[b, h, 1, d]``; raw ``[2, b, g, 192, d]``; parts, sums, dims of `runs` if there are
    any (`coded`); signs of the values' codec; gate, if `gate`, the columns of a projection.
    """
    b, h, g, d, form, _ = heads
    turned = rotated(form.value)
    constants = {
        "B": b,
        "KV": g,
        "HEADS": h // g,
        "D": d,
        "ROOT": _root(d),
        "NOISE": float_bits(noise(form.value)),
        "TURNED": int(turned),
        "WIDTH": gate,
    }
    absent = None if coded else "float"
    inputs = {"q": None, "raw": None, "parts": absent, "sums": absent}
    inputs |= {"signs": None if turned else "float", "gate": None if gate else "float"}
    inputs |= {"lengths": None, "dims": None}
    shared = (("float", max(d, 2 * PAGE)), ("float", THREADS // 32))
    outputs = (Output("y", (b, h * d), dtype),)
    return Launch("kv_join", "kv_join", constants, inputs, outputs, (h, b, 1), THREADS, shared)


def attend(
    heads: Heads, m: int, skip: int, dtype: str, raw_dtype: str, *, table: bool, gate: int
) -> list[Launch]:
    """Attention of one token over m pages: `runs`, where there are any, and `join`."""
    count = -(-(m + skip) // 8) if m else 0
    coded = [runs(heads, count, skip, table)] if count else []
    return [*coded, join(heads, bool(count), gate, dtype)]
