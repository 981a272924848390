"""Runs launch plans of `hadamoe.metal_plan` through MLX, lazily, on its Metal device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import mlx.core as mx

from . import metal_products
from .metal_plan import Launch, source
from .metal_weight import MetalWeight, metal_weight
from .packed import PackedWeight

_DTYPES = {
    n: getattr(mx, n)
    for n in ("float32", "float16", "bfloat16", "uint8", "uint32", "int32", "int8")
}


class Resident(NamedTuple):
    """A weight in MLX's memory.

    Attributes:
        plan: what launch plans need to know of it.
        words, parts: the arrays of `MetalWeight`.
        pre, post: signs of its rotation, or None.
    """

    plan: MetalWeight
    words: mx.array
    parts: mx.array
    pre: mx.array | None
    post: mx.array | None


_residents: WeakKeyDictionary[PackedWeight, dict[tuple[int, ...], Resident]] = WeakKeyDictionary()


def resident(*weights: PackedWeight) -> Resident:
    """Weights side by side (`metal_weight`) in MLX's memory; made once while they live."""
    made = _residents.setdefault(weights[0], {})
    key = tuple(map(id, weights))  # ids stay taken: what packs them together keeps them together
    if key not in made:
        w = metal_weight(*weights)
        r = w.rotation
        signs = [
            None if r is None or s is None else mx.array(s) for s in (r and r.pre, r and r.post)
        ]
        made[key] = Resident(
            replace(w, words=w.words[:0]), mx.array(w.words), mx.array(w.parts), *signs
        )
    return made[key]


def available() -> bool:
    """Whether MLX computes on a Metal device now."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu


@cache
def _kernel(
    name: str, file: str, body: str, inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> Any:
    return mx.fast.metal_kernel(
        name=name,
        input_names=list(inputs),
        output_names=list(outputs),
        header=source(file),
        source=body,
    )


def run(launch: Launch, arrays: Mapping[str, mx.array]) -> list[mx.array]:
    """The outputs of a launch, one array for each.

    Args:
        arrays: every input that is not absent, by name.
    """
    names = tuple(out.name for out in launch.outputs)
    present = tuple(launch.present)
    kernel = _kernel(launch.name, launch.file, launch.body, present, names)
    x, y, z = launch.groups
    return kernel(
        inputs=[arrays[name] for name in present],
        output_shapes=[out.shape for out in launch.outputs],
        output_dtypes=[_DTYPES[out.dtype] for out in launch.outputs],
        grid=(x * launch.threads, y, z),
        threadgroup=(launch.threads, 1, 1),
    )


def run_all(steps: Sequence[metal_products.Step], arrays: Mapping[str, mx.array]) -> mx.array:
    """The last launch's first output."""
    arrays = dict(arrays)
    for launch, to in steps:
        arrays[to] = run(launch, arrays)[0]
    return arrays[to]


def on_device(a: mx.array | None) -> mx.array | None:
    """The array, with zeros behind it if it is so small that MLX would pass it as ``constant``."""
    if a is None or a.size >= 8:
        return a
    return mx.pad(a.reshape(-1), (0, 8 - a.size))


def dtype_name(a: mx.array) -> str:
    """An array's dtype as numpy names it."""
    return str(a.dtype).removeprefix("mlx.core.")


def product(
    x: mx.array,
    w: Resident,
    *,
    norm: tuple[mx.array, float] | None = None,
    expert: mx.array | None = None,
    residual: mx.array | None = None,
    rotated: bool = False,
) -> mx.array:
    """``residual + rotate(rmsnorm(x)) @ W^T``, for any number of tokens.

    Args:
        x: ``[t, k]``; k is the weight's in_features, or its columns where ``rotated``.
        norm: (f32 ``[k]``, eps), or None.
        expert: i32 ``[t, a]``, or None.
        residual: of the result's shape, or None.
        rotated: x has been through the weight's rotation.

    Returns:
        ``[t, n]``, or ``[t, a, n]`` with ``expert``; x's dtype.
    """
    tokens, slots = x.shape[0], 0 if expert is None else expert.shape[1]
    steps = metal_products.product(
        tokens,
        w.plan,
        dtype_name(x),
        slots=slots,
        norm=None if norm is None else norm[1],
        rotate=w.plan.rotation is not None and not rotated,
        residual=residual is not None,
    )
    arrays = {"x": on_device(x), "words": w.words, "parts": w.parts, "pre": w.pre, "post": w.post}
    arrays |= {"gamma": norm and norm[0], "expert": expert, "residual": on_device(residual)}
    if metal_products.in_tiles(tokens, w.plan, slots):
        arrays["count"] = mx.array([tokens * max(slots, 1)])
        if expert is not None:
            flat = expert.reshape(-1)
            arrays["order"] = mx.argsort(flat)
            arrays["expert"] = flat[arrays["order"]]
    return run_all(steps, arrays)
