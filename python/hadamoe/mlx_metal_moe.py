"""The mixture of experts on MLX's Metal device, lazily: three launches for a few tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from . import metal_moe
from .errors import UnsupportedError
from .metal_products import hadamard, in_tiles
from .metal_weight import MetalWeight, metal_experts
from .mlx_metal import Resident, product, resident, run, run_all
from .packed import PackedWeight
from .roles import MoeWeights

#: Tokens, at most, that do not wait for one another's experts.
FEW = 8
#: Tokens at once of a prompt: what their experts leave takes 70 KB each.
MANY = 512


class Experts(NamedTuple):
    """The experts' weight and the shared one's in MLX's memory, of `metal_weight.metal_experts`."""

    plan: MetalWeight
    shared: MetalWeight
    words: mx.array
    parts: mx.array
    signs: dict[str, mx.array]
    alone: Resident  # without the shared expert
    own: Resident  # the shared expert by itself


_made: WeakKeyDictionary[MoeWeights, tuple[Experts, Experts]] = WeakKeyDictionary()


def _experts(weight: PackedWeight, shared: PackedWeight) -> Experts:
    plan, own = metal_experts(weight, shared)
    words, parts = mx.array(plan.words), mx.concatenate([mx.array(w.parts) for w in (plan, own)])
    rotation = plan.rotation or own.rotation
    found = {"pre": rotation and rotation.pre, "post": rotation and rotation.post}
    signs = {name: mx.array(s) for name, s in found.items() if s is not None}
    plan, own = (replace(w, words=w.words[:0]) for w in (plan, own))
    count = plan.experts
    both = [
        Resident(_by_itself(w), words, table, signs.get("pre"), signs.get("post"))
        for w, table in ((plan, parts[:count]), (own, parts[count:]))
    ]
    return Experts(plan, own, words, parts, signs, *both)


def _by_itself(weight: MetalWeight) -> MetalWeight:
    """The weight with the kinds of its own parts alone."""
    kinds = weight.parts[weight.parts[..., 0] > 0][:, 1]
    return replace(weight, kinds=tuple(map(int, np.unique(kinds))))


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


def _swiglu(gate_up: mx.array) -> mx.array:
    gate, up = mx.split(gate_up, 2, -1)
    return gate * mx.sigmoid(gate) * up


def _chosen(x: mx.array, half: Experts, expert: mx.array) -> mx.array:
    """``[t, a, n]``: x ``[t, k]`` times rows of a token's experts ``[t, a]``."""
    (tokens, slots), plan = expert.shape, half.plan
    if in_tiles(tokens, plan, slots):
        return product(x, half.alone, expert=expert)
    r = plan.rotation
    if r is not None:
        counts = {name: len(half.signs.get(name, ())) for name in ("pre", "post")}
        steps = hadamard(tokens, x.shape[1], "float32", block=r.block, **counts)
        x = run_all(steps, {"x": x, **half.signs})
    arrays = {"x": x, "expert": expert, "order": mx.argsort(expert.reshape(-1))}
    arrays |= {"dims": mx.array([expert.size], mx.int32), "words": half.words, "parts": half.parts}
    return run(metal_moe.product(tokens, slots, half.alone.plan), arrays)[0]


def _many(
    x: mx.array,
    norm: tuple[mx.array, float] | None,
    moe: MoeWeights,
    top_k: int,
    normalize: bool,
) -> mx.array:
    """As `_few`: tokens in the order of their experts, whose codes are read for several at once."""
    first, second = _halves(moe)
    tokens, hidden = x.shape
    y = x if norm is None else mx.fast.rms_norm(x, *norm)
    logits = product(y, resident(moe.router, moe.shared_gate))
    launch = metal_moe.route(tokens, moe.gate_up.experts, top_k, normalize=normalize)
    expert, share = run(launch, {"logits": logits})
    inner = _swiglu(_chosen(y, first, expert)).reshape(tokens * top_k, -1)
    down = _chosen(inner, second, expert.reshape(-1, 1)).reshape(tokens, top_k, hidden)
    own = product(_swiglu(product(y, first.own)), second.own)
    y = (share[:, :top_k, None] * down).sum(1) + share[:, top_k:] * own
    return y if norm is None else x + y


def _run(
    x: mx.array,
    norm: tuple[mx.array, float] | None,
    moe: MoeWeights,
    top_k: int,
    normalize: bool,
) -> mx.array:
    """x [..., hidden] f32; with a norm the result is added to x."""
    if top_k > metal_moe.MOST:
        raise UnsupportedError(f"moe_decode: top_k is {top_k}, on Metal {metal_moe.MOST} at most")
    flat = x.reshape(-1, x.shape[-1])
    if len(flat) <= FEW:
        y = _few(flat, norm, moe, top_k, normalize) if len(flat) else flat
        return y.reshape(x.shape)
    pieces = (flat[i : i + MANY] for i in range(0, len(flat), MANY))
    return mx.concatenate([_many(p, norm, moe, top_k, normalize) for p in pieces]).reshape(x.shape)


def moe_decode(x: mx.array, moe: MoeWeights, *, top_k: int, normalize: bool = True) -> mx.array:
    """`ops.moe_decode` of f32, f16 or bf16 ``[..., hidden]``."""
    return _run(x.astype(mx.float32), None, moe, top_k, normalize).astype(x.dtype)


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
    return _run(x, (norm, eps), moe, top_k, normalize)
