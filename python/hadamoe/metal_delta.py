"""Launch plan of the Gated DeltaNet between its projections."""

from __future__ import annotations

from .gpu_plan import Output
from .metal_plan import THREADS, Launch, float_bits


def gated_delta(
    batch: int,
    tokens: int,
    heads: tuple[int, int],
    head_dims: tuple[int, int],
    taps: int,
    dtype: str,
    *,
    eps: float,
    mask: bool = False,
    lengths: bool = False,
) -> list[Launch]:
    """`hadamoe.mlx.gated_delta`: y and new states in one launch, a threadgroup per sequence and
    value head.

    Args:
        tokens: t, handed to the kernel in the input ``dims``.
        mask: there is a mask ``[b, t]``.
        lengths: there are lengths ``[b]``.
    """
    (hk, hv), (dk, dv) = heads, head_dims
    channels = 2 * hk * dk + hv * dv
    wide = dv // 4 if dv % 4 == 0 else dv  # threads side by side in a row of the state
    constants = {"HK": hk, "HV": hv, "DK": dk, "DV": dv, "TAPS": taps, "THREADS": THREADS}
    names = ("proj", "conv_weight", "a_log", "dt_bias", "norm", "conv_state", "state")
    inputs = dict.fromkeys(names) | {
        "mask": None if mask else "bool",
        "lengths": None if lengths else "int",
        "dims": None,
    }
    outputs = (
        Output("y", (batch, tokens, hv * dv), dtype),
        Output("new_conv_state", (batch, channels, taps), "float32"),
        Output("new_state", (batch, hv, dk, dv), "float32"),
    )
    memory = 2 * dk + dv + THREADS // wide * dv
    launch = Launch(
        "gated_delta",
        "gated_delta",
        constants | {"EPS": float_bits(eps)},
        inputs,
        outputs,
        (hv, batch, 1),
        THREADS,
        (("float", memory), ("float2", THREADS // 32)),
    )
    return [launch]
