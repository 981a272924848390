"""Ops as sequences of kernel launches, the same for every GPU and every framework.

A `Front` is what a framework brings: arrays in its GPU's memory, the launch plans of that GPU's
kernels and a way to run one (`mlx_metal`, `mlx_cuda`, `torch_mps`, `torch_cuda`).
Arrays here are the framework's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from .errors import UnsupportedError
from .gpu_plan import Step
from .gpu_weight import GpuWeight, Words, gpu_experts, gpu_weight
from .packed import PackedWeight, rotated_columns
from .roles import MoeWeights
from .weight import Rotation


class Plans(NamedTuple):
    """The modules with a GPU's launch plans: ``metal_products`` and its siblings, or ``cuda_*``."""

    products: Any
    moe: Any
    delta: Any
    kv: Any = None


class Front(NamedTuple):
    """A framework with a GPU.

    Attributes:
        plans: launch plans of the GPU's kernels.
        array: a numpy array in the device's memory.
        run: the outputs of a launch over named input arrays; lists of integers are int32.
        argsort: stable, of integers.
        concatenate: arrays along their first axis.
        rms_norm: of x, gamma and eps, along the last axis.
    """

    plans: Plans
    array: Callable[[np.ndarray], Any]
    run: Callable[[Any, Mapping[str, Any]], list[Any]]
    argsort: Callable[[Any], Any]
    concatenate: Callable[[list[Any]], Any]
    rms_norm: Callable[[Any, Any, float], Any]


class Resident(NamedTuple):
    """A weight in a device's memory.

    Attributes:
        plan: what launch plans need to know of it.
        arrays: inputs of launches: words, parts, and pre and post, its rotation's signs or None.
    """

    plan: GpuWeight
    arrays: dict[str, Any]


class Experts(NamedTuple):
    """The experts' weight and the shared one's, in the same words.

    Attributes:
        plan, shared: theirs (`gpu_weight.gpu_experts`).
        arrays: as a `Resident`'s; the shared expert is the table's last.
        routed, own: each by itself.
    """

    plan: GpuWeight
    shared: GpuWeight
    arrays: dict[str, Any]
    routed: Resident
    own: Resident


_made: WeakKeyDictionary[PackedWeight, dict[tuple[Any, ...], Any]] = WeakKeyDictionary()


def _once(front: Front, make: Callable[..., Any], *weights: PackedWeight) -> Any:
    """make(front, *weights), kept while the weights live: what packs them keeps them together."""
    made = _made.setdefault(weights[0], {})
    key = front, make, *map(id, weights)
    if key not in made:
        made[key] = make(front, *weights)
    return made[key]


def _arrays(front: Front, words: Words, parts: Any, rotation: Rotation | None) -> dict[str, Any]:
    signs = {"pre": rotation and rotation.pre, "post": rotation and rotation.post}
    arrays = {"words": words.joined(), "parts": parts, **signs}
    return {name: None if a is None else front.array(a) for name, a in arrays.items()}


def _side_by_side(front: Front, *weights: PackedWeight) -> Resident:
    w = gpu_weight(*weights)
    return Resident(replace(w, words=None), _arrays(front, w.words, w.parts, w.rotation))


def _experts(front: Front, weight: PackedWeight, shared: PackedWeight) -> Experts:
    plan, own = gpu_experts(weight, shared)
    parts = np.concatenate([plan.parts, own.parts])
    arrays = _arrays(front, plan.words, parts, plan.rotation or own.rotation)
    plan, own = (replace(w, words=None) for w in (plan, own))
    tables = arrays["parts"][: plan.experts], arrays["parts"][plan.experts :]
    alone = []
    for w, table in zip((plan, own), tables, strict=True):
        kinds = np.unique(w.parts[w.parts[..., 0] > 0][:, 1])  # of its own parts only
        plan_alone = replace(w, kinds=tuple(map(int, kinds)))
        alone.append(Resident(plan_alone, arrays | {"parts": table}))
    return Experts(plan, own, arrays, *alone)


def resident(front: Front, *weights: PackedWeight) -> Resident:
    """Weights side by side (`gpu_weight`) in the device's memory; made once while they live."""
    return _once(front, _side_by_side, *weights)


def experts(front: Front, weight: PackedWeight, shared: PackedWeight) -> Experts:
    """Experts and the shared one in the device's memory; made once while they live."""
    return _once(front, _experts, weight, shared)


def dtype_name(dtype: Any) -> str:
    """A framework's dtype as numpy names it."""
    return str(dtype).rpartition(".")[2]


def product(
    front: Front,
    x: Any,
    w: Resident,
    *,
    norm: tuple[Any, float] | None = None,
    expert: Any = None,
    residual: Any = None,
    rotated: bool = False,
    pairs: dict[str, Any] | None = None,
) -> Any:
    """``residual + rotate(rmsnorm(x)) @ W^T``, for any number of tokens.

    Args:
        x: ``[t, k]``; k is the weight's in_features, or its columns where ``rotated``.
        norm: (f32 ``[k]``, eps), or None.
        expert: i32 ``[t, a]``, or None.
        residual: of the result's shape, or None.
        rotated: x has been through the weight's rotation.
        pairs: of `_ordered`, if it is known; tiles of theirs are kept there.

    Returns:
        ``[t, n]``, or ``[t, a, n]`` with ``expert``; x's dtype.
    """
    tokens, slots = x.shape[0], 0 if expert is None else expert.shape[1]
    steps = front.plans.products.product(
        tokens,
        w.plan,
        dtype_name(x.dtype),
        slots=slots,
        norm=None if norm is None else norm[1],
        rotate=w.plan.rotation is not None and not rotated,
        residual=residual is not None,
    )
    arrays = w.arrays | {"gamma": norm and norm[0], "expert": expert, "residual": residual}
    if front.plans.products.in_tiles(tokens, w.plan, slots):
        arrays["count"] = [tokens * max(slots, 1)]
        if expert is not None:
            pairs = _ordered(front, expert, w.plan.experts) if pairs is None else pairs
            tiles = _tiles(front, pairs, front.plans.products.schedule(tokens, w.plan, slots))
            arrays |= {**pairs, "tiles": tiles}
    return run_all(front, steps, arrays | {"x": x})


def run_all(front: Front, steps: Sequence[Step], arrays: Mapping[str, Any]) -> Any:
    """The last launch's first output."""
    arrays = dict(arrays)
    for launch, to in steps:
        arrays[to] = front.run(launch, arrays)[0]
    return arrays[to]


def largest(front: Front, x: Any, top: int, **given: Any) -> tuple[Any, Any]:
    """The ``top`` largest numbers of each row of f32 ``[t, n]`` and their places, i32: ``[t, top]``
    each; equal ones by place.

    Args:
        given: ``values`` or ``index``: arrays the last launch writes.
    """
    index = None
    launches = front.plans.products.largest(*x.shape, top)
    for i, launch in enumerate(launches):
        last = given if i + 1 == len(launches) else {}
        x, index = front.run(launch, {"x": x, "from": index} | last)
    return x, index


def hadamard(front: Front, x: Any, *, block: int | None, pre: Any, post: Any) -> Any:
    """`ops.hadamard` of x ``[..., k]``; pre and post are numpy's or the framework's."""
    k = x.shape[-1]
    wide = rotated_columns(k, block)
    arrays: dict[str, Any] = {"x": x.reshape(-1, k)}
    counts = {}
    for name, signs in (("pre", pre), ("post", post)):
        if signs is not None and len(signs) % 8:  # kernels read whole pieces of them
            known = signs if isinstance(signs, np.ndarray) else np.array(signs.tolist(), np.float32)
            signs = np.tile(known, wide // len(signs))
        counts[name] = 0 if signs is None else len(signs)
        arrays[name] = front.array(signs) if isinstance(signs, np.ndarray) else signs
    rows = arrays["x"].shape[0]
    steps = front.plans.products.hadamard(rows, k, dtype_name(x.dtype), block=block, **counts)
    return run_all(front, steps, arrays).reshape(*x.shape[:-1], wide)


def dequantize(front: Front, w: Resident, rows: Any, dtype: str) -> Any:
    """Rows ``[..., k]`` of `ops.dequantize`, their rotation not undone. A row that is not there is
    the last one: indices stay on the device."""
    flat = rows.reshape(-1)
    launch = front.plans.products.dequantize(flat.shape[0], w.plan, dtype)
    y = front.run(launch, w.arrays | {"index": flat})[0]
    return y.reshape(*rows.shape, w.plan.columns)


def gated_delta(
    front: Front,
    *arrays: Any,
    heads: tuple[int, int],
    head_dims: tuple[int, int],
    eps: float,
    mask: Any = None,
    lengths: Any = None,
    in_place: bool = False,
) -> list[Any]:
    """[y, conv_state, state] after the tokens of proj ``[b, t, ...]``.

    Args:
        arrays: proj, conv_weight, a_log, dt_bias, norm, conv_state, state, as in
            `ops.gated_delta`.
        mask: bool ``[b, t]``: False makes a token's projections 0; None for none.
        lengths: i32 ``[b]``: tokens behind leave the states as they are, their y is 0.
        in_place: the states are replaced, where the GPU's plan can; else they are left as they are.
    """
    names = ("proj", "conv_weight", "a_log", "dt_bias", "norm", "conv_state", "state")
    named = dict(zip(names, arrays, strict=True)) | {"mask": mask, "lengths": lengths}
    proj, conv_weight = arrays[:2]
    launches = front.plans.delta.gated_delta(
        *proj.shape[:2],
        heads,
        head_dims,
        conv_weight.shape[-1],
        dtype_name(proj.dtype),
        eps=eps,
        mask=mask is not None,
        lengths=lengths is not None,
    )
    named["dims"] = [proj.shape[1]]
    if in_place:
        named |= {"new_conv_state": named["conv_state"], "new_state": named["state"]}
    for launch in launches:
        made = front.run(launch, named)
        named |= {out.name: a for out, a in zip(launch.outputs, made, strict=True)}
    return [named["y"], named["new_conv_state"], named["new_state"]]


def moe(
    front: Front,
    x: Any,
    weights: MoeWeights,
    *,
    top_k: int,
    normalize: bool,
    norm: tuple[Any, float] | None = None,
) -> Any:
    """A mixture of experts of f32 ``[..., hidden]``: `ops.moe_decode`, with a norm `ops.moe_block`.

    Raises:
        UnsupportedError: more experts a token than a launch can find.
    """
    if top_k > front.plans.moe.MOST:
        raise UnsupportedError(f"moe_decode: top_k is {top_k}, here {front.plans.moe.MOST} at most")
    flat = x.reshape(-1, x.shape[-1])
    if not len(flat):
        return x
    options = {"top_k": top_k, "normalize": normalize, "norm": norm}
    if len(flat) <= front.plans.moe.FEW:
        return _few(front, flat, weights, **options).reshape(x.shape)
    many = front.plans.moe.MANY
    pieces = [flat[i : i + many] for i in range(0, len(flat), many)]
    ys = [_many(front, piece, weights, **options) for piece in pieces]
    return front.concatenate(ys).reshape(x.shape)


def _few(
    front: Front, x: Any, weights: MoeWeights, *, top_k: int, normalize: bool, norm: Any
) -> Any:
    """x ``[t, hidden]`` through three launches."""
    tokens, hidden = x.shape
    gate_up = experts(front, weights.gate_up, weights.shared_gate_up)
    down = experts(front, weights.down, weights.shared_down)
    logits = product(front, x, resident(front, weights.router, weights.shared_gate), norm=norm)
    eps = None if norm is None else norm[1]
    launch = front.plans.moe.gate_up(tokens, gate_up.plan, gate_up.shared, top_k, hidden, norm=eps)
    arrays = gate_up.arrays | {"x": x, "gamma": norm and norm[0], "logits": logits}
    (inner,) = front.run(launch, arrays)
    sizes = weights.inner_size("down"), weights.inner_size("shared_down")
    options = {"normalize": normalize, "residual": norm is not None}
    launch = front.plans.moe.down(tokens, down.plan, down.shared, top_k, sizes, **options)
    arrays = down.arrays | {"inner": inner, "logits": logits, "residual": x}
    return front.run(launch, arrays)[0]


def _many(
    front: Front, x: Any, weights: MoeWeights, *, top_k: int, normalize: bool, norm: Any
) -> Any:
    """As `_few`: tokens in the order of their experts, whose codes are read for several at once."""
    gate_up = experts(front, weights.gate_up, weights.shared_gate_up)
    down = experts(front, weights.down, weights.shared_down)
    tokens, hidden = x.shape
    y = x if norm is None else front.rms_norm(x, *norm)
    logits = product(front, y, resident(front, weights.router, weights.shared_gate))
    launch = front.plans.moe.route(tokens, weights.gate_up.experts, top_k, normalize=normalize)
    expert, share = front.run(launch, {"logits": logits})
    pairs = _ordered(front, expert, weights.gate_up.experts)

    both = _chosen(front, y, gate_up, expert, pairs).reshape(tokens * top_k, -1)
    inner, flat = _swiglu(front, both), expert.reshape(-1, 1)
    arrays = {
        "routed": _chosen(front, inner, down, flat, pairs),
        "own": product(front, _swiglu(front, product(front, y, gate_up.own)), down.own),
        "share": share,
        "residual": x,
    }
    launch = front.plans.moe.join(tokens, hidden, top_k, residual=norm is not None)
    return front.run(launch, arrays)[0]


def _ordered(front: Front, expert: Any, experts: int) -> dict[str, Any]:
    """Pairs of a token and an expert, those of one expert side by side: ``order``, their places in
    ``expert``, and ``expert``, theirs."""
    flat = expert.reshape(-1)
    launch = front.plans.moe.order(flat.shape[0], experts)
    if launch is None:
        order = front.argsort(flat)
        return {"order": order, "expert": flat[order]}
    return dict(zip(("order", "expert"), front.run(launch, {"expert": flat}), strict=True))


def _tiles(front: Front, pairs: dict[str, Any], launch: Any) -> Any:
    """What a launch cuts pairs into, made once for all products of their size; None for none."""
    if launch is None:
        return None
    name = f"tiles of {launch.sizes['most']}"
    if name not in pairs:
        pairs[name] = front.run(launch, pairs)[0]
    return pairs[name]


def _swiglu(front: Front, both: Any) -> Any:
    """silu(gate) * up of ``[r, gate | up]``."""
    launch = front.plans.moe.swiglu(both.shape[0], both.shape[1] // 2)
    return front.run(launch, {"x": both})[0]


def _chosen(front: Front, x: Any, w: Experts, expert: Any, pairs: dict[str, Any]) -> Any:
    """``[t, a, n]``: x ``[t, k]`` times rows of a token's experts ``[t, a]``, ordered in pairs."""
    tokens, slots = expert.shape
    launch = front.plans.moe.product(tokens, slots, w.routed.plan)
    if launch is None or front.plans.products.in_tiles(tokens, w.plan, slots):
        return product(front, x, w.routed, expert=expert, pairs=pairs)
    r = w.plan.rotation
    if r is not None:
        x = hadamard(front, x, block=r.block, pre=w.arrays["pre"], post=w.arrays["post"])
    arrays = w.arrays | pairs | {"x": x, "dims": [tokens * slots]}
    return front.run(launch, arrays)[0]
