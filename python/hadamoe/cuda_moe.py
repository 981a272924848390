"""Launch plans of the mixture of experts: `reference.moe_decode`, for a few tokens in three.

1. `cuda_products.qmatvec`: the router's logits and the shared gate's, side by side.
2. `gate_up`: every block finds its expert itself, so no launch waits for a choice.
3. `down`: all experts of a token, weighted and summed, and the residual.

A prompt's experts are chosen once (`route`), and their tokens multiplied together.
"""

from __future__ import annotations

from .cuda_plan import Launch
from .cuda_products import MEMORY, SPAN, shared_bytes
from .errors import UnsupportedError
from .gpu_plan import Output
from .gpu_weight import GpuWeight

#: Experts of a token at most: a lane remembers one.
MOST = 32
#: Experts of a layer at most: a lane ranks 16.
EXPERTS = 512
#: Tokens, at most, that do not wait for one another's experts.
FEW = 8
#: Tokens at once of a prompt: what their experts leave takes 140 KB each.
MANY = 4096
_HEIGHT = 48  # rows of gate and of up of a block of `gate_up`: 99 blocks for 512 and 9 experts
_ROWS = 16  # of a block of `down`: 128 blocks for 2,048
#: Compiled: numbers of an inner state that a warp rotates, by 256.
_TURNED = (2, 4)


def _rotation(experts: GpuWeight, shared: GpuWeight) -> tuple[dict[str, bool], dict[str, int]]:
    """Inputs and sizes of the rotation that either weight wants."""
    r = experts.rotation or shared.rotation
    counts = r.sign_counts if r else {"pre": 0, "post": 0}
    there = {name: n > 0 for name, n in counts.items()}
    return there, {"block": (r and r.block) or 0, **{f"{k}s": n or 1 for k, n in counts.items()}}


def _fits(what: str, need: int, most: int) -> None:
    if need > most:
        raise UnsupportedError(f"moe_decode: {what} is {need}, on CUDA {most} at most")


def _known(experts: int) -> int:
    if experts > EXPERTS:
        raise UnsupportedError(f"moe_decode: {experts} experts, on CUDA {EXPERTS} at most")
    return experts


def gate_up(
    tokens: int,
    experts: GpuWeight,
    shared: GpuWeight,
    top_k: int,
    hidden: int,
    *,
    norm: float | None = None,
) -> Launch:
    """``inner[t, top_k + 1, width] = silu(gate) * up``, the shared expert last.

    Args:
        experts, shared: of `gpu_weight.gpu_experts`.
        hidden: columns of x.
        norm: eps of the RMSNorm that x goes through first, or None.

    Raises:
        UnsupportedError: more experts than a warp can rank, rows longer than a block can hold.
    """
    inner, own = experts.rows // 2, shared.rows // 2
    width = -(-max(inner, own) // 8) * 8  # numbers are read 8 at a time
    columns = max(experts.columns, shared.columns)
    signs, sizes = _rotation(experts, shared)
    memory = shared_bytes(1, columns, columns) + 4 * (2 * _HEIGHT + 4)
    _fits("k", columns, SPAN)
    return Launch(
        "moe_gate_up",
        "moe_gate_up",
        (),
        {"x": True, "gamma": norm is not None, **signs, "logits": True, "words": True}
        | {"parts": True},
        (Output("inner", (tokens, top_k + 1, width), "float32"),),
        {
            "in": hidden,
            "columns": experts.columns,
            "shared_columns": shared.columns,
            "inner_rows": inner,
            "shared_inner": own,
            "width": width,
            "experts": _known(experts.experts),
            "top_k": top_k,
            "part_count": experts.parts.shape[1],
            **sizes,
            "eps": float(norm or 0.0),
        },
        (-(-max(inner, own) // _HEIGHT), top_k + 1, tokens),
        256,
        memory,
        experts.kinds,
    )


def down(
    tokens: int,
    experts: GpuWeight,
    shared: GpuWeight,
    top_k: int,
    inner: tuple[int, int],
    *,
    normalize: bool,
    residual: bool,
) -> Launch:
    """``y[t, n]``: the weighted experts, the shared one and, where ``residual``, x.

    Args:
        inner: numbers of an expert's inner state, of the shared one's.

    Raises:
        UnsupportedError: more experts than a warp can rank, inner states longer than it can hold.
    """
    columns = max(experts.columns, shared.columns)
    signs, sizes = _rotation(experts, shared)
    turned = max(w.columns if w.rotation else 0 for w in (experts, shared))
    _fits("a rotated inner state", turned, 256 * _TURNED[-1])
    each = 1024 * (-(-columns // 256) * 2) + 4 * _ROWS  # bytes a warp keeps: `moe_down`
    fixed = 768 + 4 * ((top_k + 1) * _ROWS + 128)
    count = next(n for n in _TURNED if 256 * n >= min(columns, 1024))
    warps = min(9 if count == 2 else 8, top_k + 1, max(1, (48 * 1024 - fixed) // each))
    _fits("bytes of an inner state", fixed + warps * each, MEMORY)
    return Launch(
        "moe_down",
        "moe_down",
        (count,),
        {"inner": True, **signs, "logits": True, "words": True, "parts": True}
        | {"residual": residual},
        (Output("y", (tokens, experts.rows), "float32"),),
        {
            "rows": experts.rows,
            "inner_of": inner[0],
            "shared_inner": inner[1],
            "columns": experts.columns,
            "shared_columns": shared.columns,
            "width": -(-max(inner) // 8) * 8,
            "experts": _known(experts.experts),
            "top_k": top_k,
            "part_count": experts.parts.shape[1],
            "normalize": int(normalize),
            **sizes,
        },
        (-(-experts.rows // _ROWS), tokens, 1),
        32 * warps,
        fixed + warps * each,
        experts.kinds,
    )


def route(tokens: int, experts: int, top_k: int, *, normalize: bool) -> Launch:
    """``expert[t, top_k]`` and ``share[t, top_k + 1]``, the last the shared expert's.

    Raises:
        UnsupportedError: more experts than a warp can rank.
    """
    return Launch(
        "moe_route",
        "moe_prompt",
        (),
        {"logits": True},
        (
            Output("expert", (tokens, top_k), "int32"),
            Output("share", (tokens, top_k + 1), "float32"),
        ),
        {
            "tokens": tokens,
            "experts": _known(experts),
            "top_k": top_k,
            "normalize": int(normalize),
        },
        (-(-tokens // 4), 1, 1),
        128,
    )


def order(pairs: int, experts: int) -> Launch:
    """``order``, ``sorted``: i32 ``[pairs]``, places of pairs by ``expert``, and their experts."""
    return Launch(
        "moe_order",
        "moe_prompt",
        (),
        {"expert": True},
        (Output("order", (pairs,), "int32"), Output("sorted", (pairs,), "int32")),
        {"pairs": pairs},
        (experts, 1, 1),
        256,
        2 * 8 * 4,
    )


def swiglu(rows: int, width: int) -> Launch:
    """``y [rows, width] = silu(gate) * up`` of ``x [rows, gate | up]``."""
    return Launch(
        "moe_swiglu",
        "moe_prompt",
        (),
        {"x": True},
        (Output("y", (rows, width), "float32"),),
        {"width": width},
        (rows, -(-width // 1024), 1),
        128,
    )


def join(tokens: int, width: int, top_k: int, *, residual: bool) -> Launch:
    """``y[t, n]``: what ``routed [t, top_k, n]`` and ``own [t, n]`` add up to by ``share``, and
    ``residual``."""
    return Launch(
        "moe_join",
        "moe_prompt",
        (),
        {"routed": True, "own": True, "share": True, "residual": residual},
        (Output("y", (tokens, width), "float32"),),
        {"width": width, "top_k": top_k},
        (tokens, -(-width // 1024), 1),
        128,
    )


def product(tokens: int, slots: int, experts: GpuWeight) -> None:
    """None: too few pairs for tiles go through `cuda_products.qmatvec`."""
