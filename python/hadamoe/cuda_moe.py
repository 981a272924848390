"""Launch plans of the mixture of experts: `reference.moe_decode`, for a few tokens in three.

1. `cuda_products.qmatvec`: the router's logits and the shared gate's, side by side.
2. `gate_up`: every block finds its expert itself, so no launch waits for a choice.
3. `down`: all experts of a token, weighted and summed, and the residual.

A prompt's experts are chosen once (`route`), and their tokens multiplied together.
"""

from __future__ import annotations

from .cuda_plan import Launch
from .errors import UnsupportedError
from .gpu_plan import Output

#: Experts of a token at most: a lane remembers one.
MOST = 32
#: Experts of a layer at most: a lane ranks 16.
EXPERTS = 512
#: Tokens, at most, that do not wait for one another's experts.
FEW = 8
#: Tokens at once of a prompt: what their experts leave takes 140 KB each.
MANY = 4096


def _known(experts: int) -> int:
    if experts > EXPERTS:
        raise UnsupportedError(f"moe_decode: {experts} experts, on CUDA {EXPERTS} at most")
    return experts


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
