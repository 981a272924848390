"""The mixture of experts on MLX's Metal device, lazily: three launches for a few tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import mlx.core as mx

from . import metal_moe
from .errors import UnsupportedError
from .metal_weight import MetalWeight, metal_experts
from .mlx_metal import product, resident, run
from .packed import PackedWeight
from .roles import MoeWeights


class Experts(NamedTuple):
    """The experts' weight and the shared one's in MLX's memory, of `metal_weight.metal_experts`."""

    plan: MetalWeight
    shared: MetalWeight
    words: mx.array
    parts: mx.array
    signs: dict[str, mx.array]


_made: WeakKeyDictionary[MoeWeights, tuple[Experts, Experts]] = WeakKeyDictionary()


def _experts(weight: PackedWeight, shared: PackedWeight) -> Experts:
    plan, own = metal_experts(weight, shared)
    words, parts = mx.array(plan.words), mx.concatenate([mx.array(w.parts) for w in (plan, own)])
    rotation = plan.rotation or own.rotation
    signs = {"pre": rotation and rotation.pre, "post": rotation and rotation.post}
    return Experts(
        *(replace(w, words=w.words[:0]) for w in (plan, own)),
        words,
        parts,
        {name: mx.array(s) for name, s in signs.items() if s is not None},
    )


def _halves(moe: MoeWeights) -> tuple[Experts, Experts]:
    """gate_up and down; made once while ``moe`` lives."""
    if moe not in _made:
        _made[moe] = (
            _experts(moe.gate_up, moe.shared_gate_up),
            _experts(moe.down, moe.shared_down),
        )
    return _made[moe]


def _few(
    x: mx.array,
    norm: tuple[mx.array, float] | None,
    moe: MoeWeights,
    top_k: int,
    normalize: bool,
) -> mx.array:
    """x [t, hidden] f32 through three launches; with a norm the result is added to x."""
    if top_k > metal_moe.MOST:
        raise UnsupportedError(f"moe_decode: top_k is {top_k}, on Metal {metal_moe.MOST} at most")
    if not len(x):
        return x
    first, second = _halves(moe)
    tokens = len(x)
    logits = product(x, resident(moe.router, moe.shared_gate), norm=norm)
    launch = metal_moe.gate_up(
        tokens, first.plan, first.shared, top_k, x.shape[1], norm=None if norm is None else norm[1]
    )
    arrays = {"x": x, "gamma": norm and norm[0], "logits": logits, **first.signs}
    (inner,) = run(launch, arrays | {"words": first.words, "parts": first.parts})
    launch = metal_moe.down(
        tokens,
        second.plan,
        second.shared,
        top_k,
        (moe.inner_size("down"), moe.inner_size("shared_down")),
        normalize=normalize,
        residual=norm is not None,
    )
    arrays = {"inner": inner, "logits": logits, "residual": x, **second.signs}
    return run(launch, arrays | {"words": second.words, "parts": second.parts})[0]


def moe_decode(x: mx.array, moe: MoeWeights, *, top_k: int, normalize: bool = True) -> mx.array:
    """`ops.moe_decode` of f32, f16 or bf16 ``[..., hidden]``."""
    flat = x.reshape(-1, x.shape[-1]).astype(mx.float32)
    return _few(flat, None, moe, top_k, normalize).astype(x.dtype).reshape(x.shape)


def moe_block(
    x: mx.array,
    norm: mx.array,
    moe: MoeWeights,
    *,
    top_k: int,
    normalize: bool = True,
    eps: float = 1e-6,
) -> mx.array:
    """`ops.moe_block` of f32 ``[..., hidden]``."""
    flat = x.reshape(-1, x.shape[-1])
    return _few(flat, (norm, eps), moe, top_k, normalize).reshape(x.shape)
