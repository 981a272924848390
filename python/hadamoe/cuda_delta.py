"""Launch plans of the Gated DeltaNet between its projections."""

from __future__ import annotations

from .cuda_plan import NUMBERS, Launch
from .errors import UnsupportedError
from .gpu_plan import Output

#: Numbers of a head, and taps of the convolution, at most.
HEAD, TAPS = 256, 8
#: Those of the smaller instances, and of `delta_step`.
SMALL_HEAD, SMALL_TAPS = 128, 4
#: Tokens that a warp of `delta_prepare` convolves.
TILE = 16


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
    """`gpu_calls.gated_delta`: two launches for one token, else three.

    ``new_conv_state`` may be ``conv_state`` and ``new_state`` ``state``. No launch may come between
    these: the second reads ``state`` while the first runs.

    Args:
        mask: there is a mask, bool ``[b, t]``.
        lengths: there are lengths, int32 ``[b]``.

    Raises:
        UnsupportedError: heads of more than 256 numbers, more than 8 taps.
    """
    (hk, hv), (dk, dv) = heads, head_dims
    if max(dk, dv) > HEAD:
        raise UnsupportedError(f"gated_delta: heads of {dk} and {dv}, on CUDA {HEAD} at most")
    if taps > TAPS:
        raise UnsupportedError(f"gated_delta: {taps} taps, on CUDA {TAPS} at most")
    sizes = {"hk": hk, "hv": hv, "dk": dk, "dv": dv}
    number = NUMBERS[dtype]
    there = {"mask": mask, "lengths": lengths}
    y = Output("y", (batch, tokens, hv * dv), dtype)
    state = Output("new_state", (batch, hv, dk, dv), "float32")
    small = max(dk, dv) <= SMALL_HEAD
    prepare = _prepare(batch, tokens, sizes, taps, number, there)
    if tokens == 1 and small and dv % 4 == 0:
        names = ("proj", "qkv", "gates", "norm", "state")
        step = Launch(
            "delta_step",
            "gated_delta_step",
            (),
            dict.fromkeys(names, True) | there,
            (y, state),
            sizes | {"dtype": number, "eps": float(eps)},
            (hv // hk, hk, batch),
            512,
            4 * ((7 + 16) * SMALL_HEAD + 2),  # delta_step::Shared
        )
        return [prepare, step]
    rows = 16 if dk <= SMALL_HEAD else 32  # of the state that a lane has
    ring, token = 3 * 128 // rows, 2 * 8 * rows + 32 + 4  # delta_scan::SHARED
    scan = Launch(
        "delta_scan",
        "gated_delta_scan",
        (rows,),
        dict.fromkeys(("qkv", "gates", "state"), True) | {"lengths": lengths},
        (Output("o", (batch, tokens, hv, dv), "float32"), state),
        {"tokens": tokens} | sizes,
        (-(-dv // 32), hv, batch),
        128,
        4 * ring * token,
    )
    norm = Launch(
        "delta_norm",
        "gated_delta_scan",
        (),
        dict.fromkeys(("o", "proj", "norm"), True) | there,
        (y,),
        {"rows": batch * tokens, "tokens": tokens} | sizes | {"dtype": number, "eps": float(eps)},
        (-(-batch * max(tokens, 1) * hv // 8), 1, 1),
        256,
    )
    return [prepare, scan, norm]


def _prepare(
    batch: int,
    tokens: int,
    sizes: dict[str, int],
    taps: int,
    number: int,
    there: dict[str, bool],
) -> Launch:
    hk, hv, dk, dv = sizes.values()
    channels = 2 * hk * dk + hv * dv
    small = max(dk, dv) <= SMALL_HEAD and taps <= SMALL_TAPS
    names = ("proj", "conv_weight", "a_log", "dt_bias", "conv_state")
    warps = 1 if tokens == 1 else 4
    units = 2 * hk + hv + -(-hv // 32)  # heads, then gates
    return Launch(
        "delta_prepare",
        "gated_delta_prepare",
        (SMALL_HEAD // 32, SMALL_TAPS) if small else (HEAD // 32, TAPS),
        dict.fromkeys(names, True) | there,
        (
            Output("qkv", (batch, tokens, channels), "float32"),
            Output("gates", (batch, tokens, hv, 2), "float32"),
            Output("new_conv_state", (batch, channels, taps), "float32"),
        ),
        {"tokens": tokens, "tile": TILE} | sizes | {"taps": taps, "dtype": number},
        (-(-units // warps), max(-(-tokens // TILE), 1), batch),
        32 * warps,
    )
