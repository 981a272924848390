"""Launch plans of the quantized KV cache: pages to codes and back, scores, attention over pages."""

from __future__ import annotations

from . import gpu_kv
from .cuda_plan import NUMBERS, Launch
from .errors import UnsupportedError
from .gpu_kv import noise, our_bits, rotated, worth
from .gpu_plan import Output
from .kv import CODECS, PAGE, PRESETS, page_bytes

#: Columns of a head that kernels are compiled for.
HEAD_DIMS = (32, 64, 128, 256)
#: Stands for every codec where a kernel is compiled for one: as in cuda/kv_runs.cuh.
ANY = 99
#: Formats of 256 columns with a kernel of their own for `runs`, where raw rows have 16 bits: it
#: needs half the registers of the one for all codecs.
COMPILED = [PRESETS[name] for name in ("bf16", "hk8v8", "hk8v4", "hk4v4", "hk4v3", "hk4v2")]
#: Tokens that the raw rows of a sequence hold: page 0, the newest page and the one before it.
RAW = 3 * PAGE


def _columns(d: int) -> int:
    if d not in HEAD_DIMS:
        raise UnsupportedError(f"kv: head_dim is {d}, on CUDA {', '.join(map(str, HEAD_DIMS))}")
    return d


def encode(
    pages: int, codec: str, side: str, d: int, scale: float = 1.0, dtype: str = "float32"
) -> Launch:
    """`kv_ops.kv_encode`: rows ``[pages, 64, d]`` of a dtype to u8 ``[pages, bytes]``.

    Arrays: rows; signs f32 ``[d]`` of codecs that rotate; book f32 ``[16]``: a turbo codec's.
    """
    sizes = {"codec": CODECS[codec], "values": int(side == "value"), "scale": float(scale)}
    return Launch(
        "kv_encode",
        "kv_encode",
        (_columns(d),),
        {"rows": True, "signs": rotated(codec), "book": codec.startswith("turbo")},
        (Output("pages", (pages, page_bytes(codec, d)), "uint8"),),
        sizes | {"dtype": NUMBERS[dtype]},
        (pages, 1, 1),
        d,
        PAGE * d,
    )


def decode(
    pages: int | tuple[int, int, int],
    codec: str,
    side: str,
    d: int,
    dtype: str = "float32",
    scale: float = 1.0,
) -> Launch:
    """`kv_ops.kv_decode`: u8 ``[pages, bytes]`` to rows ``[pages, 64, d]``; arrays as there.

    Args:
        pages: how many; or (b, groups, pages): u8 ``[places, groups, bytes]`` by an array more,
            table i32 ``[b, pages]`` of places, to rows ``[b, groups, pages, 64, d]``; zeros where
            the place is negative.
    """
    placed = not isinstance(pages, int)
    shape = pages if placed else (pages,)
    groups = (8 * shape[2], shape[1], shape[0]) if placed else (8 * pages, 1, 1)
    sizes = {"codec": CODECS[codec], "values": int(side == "value"), "scale": float(scale)}
    inputs = {"pages": True, "signs": rotated(codec), "book": codec.startswith("turbo")}
    return Launch(
        "kv_decode",
        "kv_encode",
        (_columns(d),),
        inputs | {"table": placed},
        (Output("rows", (*shape, PAGE, d), dtype),),
        sizes | {"dtype": NUMBERS[dtype]},
        groups,
        256,
    )


class Heads(gpu_kv.Heads):
    """`gpu_kv.Heads`, and what CUDA's launches are told of them."""

    @property
    def sides(self) -> dict[str, int | float]:
        """Codecs and scales, as kernels are told them."""
        codecs = {"key": CODECS[self.format.key], "value": CODECS[self.format.value]}
        return codecs | {"key_scale": float(self.scales[0]), "value_scale": float(self.scales[1])}

    @property
    def tables(self) -> dict[str, bool]:
        """What codecs read: key_signs, value_signs f32 ``[d]``, book f32 ``[32]``."""
        turbo = any(codec.startswith("turbo") for codec in self.format)
        turned = {"key_signs": rotated(self.format.key), "value_signs": rotated(self.format.value)}
        return turned | {"book": turbo}

    def pages(self, places: int | tuple[int, int]) -> tuple[Output, Output]:
        """The cache's pages: ``[places, kv, bytes]``, or [batch, kv, m, bytes] of (batch, m)."""
        shape = (places, self.kv) if isinstance(places, int) else (places[0], self.kv, places[1])
        key, value = (page_bytes(codec, self.d) for codec in self.format)
        return (
            Output("key_pages", (*shape, key), "uint8"),
            Output("value_pages", (*shape, value), "uint8"),
        )

    def raw(self, dtype: str) -> Output:
        """Raw rows: page 0, then page p from row 64 (1 + p % 2) on."""
        return Output("raw", (2, self.batch, self.kv, RAW, self.d), dtype)


def append(
    heads: Heads, tokens: int, m: int, skip: int, dtype: str, *, counts: bool, table: bool
) -> Launch:
    """Tokens of a prompt to a cache: raw rows of its first and last two pages, codes of full ones.

    The same bytes as from the tokens one by one. Arrays: kv ``[2, b, g, t, d]`` of dtype; lengths
    i32 ``[b]``: tokens before; counts i32 ``[b]``: how many of the t tokens are real, the last
    ones; `Heads.tables`. Written in place: raw ``[2, b, g, 192, d]`` of dtype, key_pages and
    value_pages u8, ``[b, g, m, bytes]``, page p at p - skip, or ``[places, g, bytes]`` with a table
    i32 ``[b, m]`` of places.
    """
    inputs = {"kv": True, "lengths": True, "counts": counts, "table": table} | heads.tables
    sizes = {"tokens": tokens, "m": m, "skip": skip} | heads.sides | {"dtype": NUMBERS[dtype]}
    return Launch(
        "kv_append",
        "kv_encode",
        (_columns(heads.d),),
        inputs,
        (heads.raw(dtype), *heads.pages((heads.batch, m))),
        sizes,
        ((tokens + PAGE - 2) // PAGE + 1, 2 * heads.kv, heads.batch),
        heads.d,
        PAGE * heads.d,
    )


def scores(rows: int, pages: int, codec: str, d: int, dtype: str = "float32") -> Launch:
    """`kv_ops.kv_scores` of q ``[rows, d]`` of a dtype, u8 pages ``[pages, bytes]`` and signs."""
    outputs = (
        Output("q8", (rows, d), "int8"),
        Output("unit", (rows,), "float32"),
        Output("scores", (rows, pages * PAGE), "int32"),
    )
    return Launch(
        "kv_scores",
        "kv_scores",
        (_columns(d),),
        {"q": True, "pages": True, "signs": True},
        outputs,
        {"rows": rows, "codec": CODECS[codec], "dtype": NUMBERS[dtype]},
        (pages, -(-rows // 8), 1),
        64,
        8 * d,
    )


def prepare(
    heads: Heads,
    tokens: int,
    rot: int,
    kv_dtype: str,
    *,
    eps: float | None,
    stretch: float = 1.0,
    placed: bool = False,
    dtype: str = "float32",
    q_dtype: str = "float32",
) -> Launch:
    """RMSNorm and positions of queries and keys of a projection ``[b, t, (2 h + 2 g) d]``.

    Arrays: proj; q_norm, k_norm f32 ``[d]`` unless eps is None; freqs f32 ``[rot / 2]``, radians a
    position; signs of the keys' codec; offsets i32 ``[b]``: positions before. Results: q
    ``[b, h, t, d]``; kv ``[2, b, g, t, d]``; for a cache with codes x ``[b, h, t, d]`` and factors
    f32 ``[b, h, t]``, queries as scores of coded pages take them.

    Args:
        rot: columns that positions turn.
        kv_dtype: of keys and values, the cache's; dtype: of proj; q_dtype: of q.
        stretch: what YaRN multiplies cosines and sines with.
        placed: keys and values go to the raw rows of a cache, written in place under the name raw
            ``[2, b, g, 192, d]``, each where its position belongs. Of several tokens that fill a
            page and begin another, `append` stores the codes, so this is for single tokens.
    """
    b, h, g, d, form, scales = heads
    coded = form is not None
    turned = coded and rotated(form.key)
    kv = heads.raw(kv_dtype) if placed else Output("kv", (2, b, g, tokens, d), kv_dtype)
    inputs = {"proj": True, "q_norm": eps is not None, "k_norm": eps is not None}
    inputs |= {"freqs": rot > 0, "signs": turned, "offsets": True}
    sizes = {"batch": b, "tokens": tokens, "heads": h, "groups": g, "rot": rot}
    sizes |= {"eps": float(eps or 0.0), "stretch": float(stretch), "placed": int(placed)}
    sizes |= {"coded": 0 if not coded else 2 if our_bits(form.key) else 1}
    sizes |= {"worth": worth(form.key, d, scales[0]) if coded else 0.0}
    outputs = [
        Output("q", (b, h, tokens, d), q_dtype),
        kv,
        Output("x", (b, h, tokens, d) if coded else (1,), heads.query_dtype),
        Output("factors", (b, h, tokens) if coded else (1,), "float32"),
    ]
    return Launch(
        "attention",
        "attention",
        (_columns(d),),
        inputs,
        tuple(outputs),
        sizes
        | {
            "proj_dtype": NUMBERS[dtype],
            "q_dtype": NUMBERS[q_dtype],
            "kv_dtype": NUMBERS[kv_dtype],
        },
        (-(-b * tokens * (h + 2 * g) // 4), 1, 1),
        128,
        4 * 4 * d,
    )


_NO_PAGES = Output("key_pages", (1,), "uint8"), Output("value_pages", (1,), "uint8")
#: Parts that the coded pages of a head come in, at most, and the pages of one at least: as in
#: cuda/kv_runs.cuh. Two more are raw pages.
PARTS, RUN, RAW_PARTS = 128, 4, 2


def slots(m: int, skip: int = 0) -> int:
    """Parts a head for caches of m pages."""
    return RAW_PARTS + min(PARTS, -(-(m + skip) // RUN))


def runs(
    heads: Heads, m: int, skip: int, dtype: str, *, table: bool = False, places: int = 0,
    more: int = 0, fixed: bool = False,
) -> Launch:  # fmt: skip
    """Attention of one token of each sequence over its pages, in parts for `join`; the page that
    the token fills is encoded.

    Arrays: q, x, factors of `prepare`; raw ``[2, b, g, 192, d]`` of dtype, the token in it already;
    `Heads.tables`; lengths i32 ``[b]``, the token counted. Read and written in place: key_pages,
    value_pages u8, ``[b, g, m, bytes]``, page p at p - skip, or ``[places, g, bytes]`` with a table
    i32 ``[b, m]``. Pages behind a sequence's length are not touched, so m may be any capacity.

    Args:
        more: tokens that lengths do not count yet: 1 if they are those before this one.
        fixed: pages are inputs, fixed_keys and fixed_values, and nothing is encoded.
    """
    b, h, g, d, form, _ = heads
    inputs = {"q": True, "x": True, "factors": True, "raw": True, "table": table}
    inputs |= heads.tables | {"lengths": True, "fixed_keys": fixed, "fixed_values": fixed}
    parts, group = slots(m, skip), h // g
    outputs = (
        Output("parts", (b, g, parts, group, d), "float32"),
        Output("sums", (b, g, parts, group, 4), "float32"),
        *(_NO_PAGES if fixed else heads.pages(places if table else (b, m))),
    )
    sizes = {"groups": g, "heads": group, "m": m, "skip": skip, "more": more}
    sizes |= heads.sides | {"worth": worth(form.value, d, heads.scales[1])}
    codecs = ANY, ANY
    if d == 256 and form in COMPILED and dtype != "float32":
        codecs = CODECS[form.key], CODECS[form.value]
    return Launch(
        "kv_runs",
        "kv_runs",
        (_columns(d), *codecs),
        inputs,
        outputs,
        sizes | {"raw_dtype": NUMBERS[dtype]},
        (parts + 2, g * -(-group // 8), b),
        d,
        40 * d + 27168,
    )


def join(
    heads: Heads, parts: int, gate: int, dtype: str, *, gate_dtype: str = "float32", more: int = 0
) -> Launch:
    """The rest of it: all parts of `runs` to y ``[b, h d]`` of dtype.

    Arrays: parts, sums, lengths of `runs`, `parts` of them a head (`slots`); signs of the values'
    codec; gate, if `gate`, the columns of a projection of gate_dtype, of which gates are a part.
    """
    b, h, g, d, form, _ = heads
    sizes = {"groups": g, "heads": h // g, "slots": parts, "more": more, "width": gate}
    sizes |= {
        "noise": noise(form.value),
        "gate_dtype": NUMBERS[gate_dtype],
        "dtype": NUMBERS[dtype],
    }
    return Launch(
        "kv_join",
        "kv_join",
        (_columns(d),),
        {"parts": True, "sums": True, "signs": rotated(form.value), "gate": gate > 0}
        | {"lengths": True},
        (Output("y", (b, h * d), dtype),),
        sizes,
        (h, b, 1),
        256,
        4 * (1024 + PARTS + 4),
    )


def attend(
    heads: Heads, m: int, skip: int, dtype: str, raw_dtype: str, *, table: bool, gate: int
) -> list[Launch]:
    """Attention of one token over m pages that stay as they are: `runs` and `join`."""
    return [
        runs(heads, m, skip, raw_dtype, table=table, fixed=True),
        join(heads, slots(m, skip), gate, dtype),
    ]
