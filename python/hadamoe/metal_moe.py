"""Launch plans of the mixture of experts: `reference.moe_decode`, for a few tokens in three.

1. `metal_products.qmatvec`: the router's logits and the shared gate's, side by side.
2. `gate_up`: every threadgroup finds its expert itself, so no launch waits for a choice.
3. `down`: all experts of a token, weighted and summed, and the residual.

A prompt's experts are chosen once (`route`), and their tokens multiplied together (`product`).
"""

from __future__ import annotations

from .gpu_plan import Output
from .gpu_weight import GpuWeight
from .metal_plan import THREADS, Launch, float_bits
from .metal_products import TOKENS, lanes, shared_columns, table_files

#: Experts of a token at most: a lane remembers one.
MOST = 32
#: Tokens, at most, that do not wait for one another's experts.
FEW = 8
#: Tokens at once of a prompt: what their experts leave takes 70 KB each.
MANY = 512
_SIMDGROUPS = 8  # of a threadgroup, at most
_HEIGHT = 4  # rows of gate and of up that a simdgroup of `gate_up` has
_ROWS = 16  # rows that a threadgroup of `down` has: 128 groups for 2,048


def _rotation(experts: GpuWeight, shared: GpuWeight) -> tuple[dict, dict]:
    """Constants and inputs of a kernel that rotates; empty where neither weight wants that."""
    r = experts.rotation or shared.rotation
    if r is None:
        return {}, {}
    signs = {"pre": r.pre, "post": r.post}
    counts = {name.upper() + "S": 1 if s is None else len(s) for name, s in signs.items()}
    inputs = {name: "float" if s is None else None for name, s in signs.items()}
    return {"BLOCK": r.block or 0, **counts}, inputs


def _kinds(weight: GpuWeight) -> dict[str, int]:
    return {f"KIND{i}": kind for i, kind in enumerate(weight.kinds)}


def _file(weight: GpuWeight, name: str) -> str:
    return "+".join([*table_files(weight.kinds), name])


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
    """
    inner, own = experts.rows // 2, shared.rows // 2
    width = -(-max(inner, own) // 8) * 8  # numbers are read 8 at a time
    columns = max(experts.columns, shared.columns)
    blocks = -(-width // _HEIGHT)
    simds = min(_SIMDGROUPS, blocks)
    constants = {
        "IN": hidden,
        "INNER": inner,
        "SHARED": own,
        "EXPERTS": experts.experts,
        "TOP_K": top_k,
        "PARTS": experts.parts.shape[1],
        "HEIGHT": _HEIGHT,
        "THREADS": 32 * simds,
        "EPS": float_bits(norm or 0.0),
    }
    turn, signs = _rotation(experts, shared)
    if turn:
        turned = {"TURNED": experts.rotation, "SHARED_TURNED": shared.rotation}
        constants |= {"K": columns, **{n: int(r is not None) for n, r in turned.items()}, **turn}
    name = "moe_gate_up_rotated" if turn else "moe_gate_up"
    return Launch(
        name,
        _file(experts, name),
        constants | _kinds(experts),
        {
            "x": None,
            "gamma": None if norm is not None else "float",
            **signs,
            **dict.fromkeys(("logits", "words", "parts")),
        },
        (Output("inner", (tokens, top_k + 1, width), "float32"),),
        (-(-blocks // simds), top_k + 1, tokens),
        32 * simds,
        (("float", shared_columns(columns)), ("float", simds), ("float", simds * 2 * _HEIGHT)),
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
    """
    simds = min(_SIMDGROUPS, top_k)
    own = -(-_ROWS // simds)
    constants = {
        "N": experts.rows,
        "IN": inner[0],
        "SHARED_IN": inner[1],
        "EXPERTS": experts.experts,
        "TOP_K": top_k,
        "PARTS": experts.parts.shape[1],
        "NORMALIZE": int(normalize),
        "HEIGHT": _ROWS,
        "OWN": own,
        "THREADS": 32 * simds,
    }
    turn, signs = _rotation(experts, shared)
    if turn:
        constants |= {"K": experts.columns, "SHARED_K": shared.columns, **turn}
    name = "moe_down_rotated" if turn else "moe_down"
    return Launch(
        name,
        _file(experts, name),
        constants | _kinds(experts),
        {
            "inner": None,
            **signs,
            **dict.fromkeys(("logits", "words", "parts")),
            "residual": None if residual else "float",
        },
        (Output("y", (tokens, experts.rows), "float32"),),
        (-(-experts.rows // _ROWS), tokens, 1),
        32 * simds,
        (("float", top_k * _ROWS + simds * own),),
    )


def route(tokens: int, experts: int, top_k: int, *, normalize: bool) -> Launch:
    """``expert[t, top_k]`` and ``share[t, top_k + 1]``, the last the shared expert's."""
    return Launch(
        "moe_route",
        "moe_route",
        {"EXPERTS": experts, "TOP_K": top_k, "NORMALIZE": int(normalize)},
        {"logits": None},
        (
            Output("expert", (tokens, top_k), "int32"),
            Output("share", (tokens, top_k + 1), "float32"),
        ),
        (tokens, 1, 1),
        32,
    )


def order(pairs: int, experts: int) -> None:
    """None: the framework sorts a prompt's pairs by their experts."""


def swiglu(rows: int, width: int) -> Launch:
    """``y [rows, width] = silu(gate) * up`` of ``x [rows, gate | up]``."""
    return Launch(
        "moe_swiglu",
        "moe_prompt",
        {"WIDTH": width, "THREADS": THREADS},
        {"x": None},
        (Output("y", (rows, width), "float32"),),
        (-(-width // THREADS), rows, 1),
        THREADS,
    )


def join(tokens: int, width: int, top_k: int, *, residual: bool) -> Launch:
    """``y[t, n]``: what ``routed [t, top_k, n]`` and ``own [t, n]`` add up to by ``share``, and
    ``residual``."""
    return Launch(
        "moe_join",
        "moe_prompt",
        {"WIDTH": width, "TOP_K": top_k, "THREADS": THREADS},
        {"routed": None, "own": None, "share": None, "residual": None if residual else "float"},
        (Output("y", (tokens, width), "float32"),),
        (-(-width // THREADS), tokens, 1),
        THREADS,
    )


def product(tokens: int, slots: int, experts: GpuWeight) -> Launch:
    """``y[t, slots, n]``: rows of a slot's expert times ``x [t, columns]``, rotated or not."""
    height = max(32 // min(lanes(experts.columns, kind) for kind in experts.kinds), 4)
    blocks = -(-experts.rows // height)
    simds = min(_SIMDGROUPS, blocks)
    constants = {
        "K": experts.columns,
        "N": experts.rows,
        "SLOTS": slots,
        "PARTS": experts.parts.shape[1],
        "HEIGHT": height,
        "TOKENS": TOKENS,
        "THREADS": 32 * simds,
    }
    return Launch(
        "moe_experts",
        _file(experts, "moe_experts"),
        constants | _kinds(experts),
        dict.fromkeys(("x", "expert", "order", "dims", "words", "parts")),
        (Output("y", (tokens, slots, experts.rows), "float32"),),
        (-(-blocks // simds), -(-tokens * slots // TOKENS), 1),
        32 * simds,
    )
