"""Random weights of every compiled instance, and the cases of every op on them.

Tests, ``hadamoe verify`` and the runners of other CPUs go through the same generators.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from . import ops, reference, rounding
from .claims import Case, rounding_bound
from .weight import Instance, Part, Weight

# ---- storage dtypes (bf16 travels as u16 bits) ----


def to_bf16(x: np.ndarray) -> np.ndarray:
    """f32 -> bf16 bits (u16), round to nearest even."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(x: np.ndarray) -> np.ndarray:
    """bf16 bits (u16) -> f32."""
    return (np.ascontiguousarray(x).astype(np.uint32) << 16).view(np.float32)


def to_storage(x: np.ndarray, dtype: str) -> np.ndarray:
    """f32 -> ``f32``, ``f16`` bits or ``bf16`` bits (u16), as a weight's scales are stored."""
    if dtype == "f32":
        return np.ascontiguousarray(x, np.float32)
    return to_bf16(x) if dtype == "bf16" else np.ascontiguousarray(x, np.float16).view(np.uint16)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """f64 -> the nearest number of ``dtype``, as f64 (through f32, as a kernel's store does)."""
    f = np.asarray(x, np.float64).astype(np.float32)
    if dtype == "bf16":
        return from_bf16(to_bf16(f)).astype(np.float64)
    return f.astype(np.float16 if dtype == "f16" else np.float32).astype(np.float64)


# ---- random weights of one instance ----


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes ``[rows, k]`` -> u8 ``[rows, ceil(k * bits / 8)]``, a little-endian stream per row."""
    stream = (codes[..., None].astype(np.uint32) >> np.arange(bits, dtype=np.uint32)) & 1
    return np.packbits(
        stream.reshape(codes.shape[0], -1).astype(np.uint8), axis=1, bitorder="little"
    )


def pack_gguf(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """E2M1 codes ``[rows, k]``, E8M0 ``[rows, k / 32]`` -> GGUF blocks ``[rows, 17 * k / 32]``."""
    rows, k = codes.shape
    c = codes.reshape(rows, k // 32, 2, 16).astype(np.uint8)
    block = np.concatenate([scale[..., None], c[:, :, 0] | c[:, :, 1] << 4], axis=2)
    return np.ascontiguousarray(block.reshape(rows, -1))


def _scale(
    rng: np.random.Generator, inst: Instance, shape: tuple[int, int], kind: str
) -> np.ndarray:
    if inst.scale == "e8m0":
        return (
            rng.integers(126, 129, shape, np.uint8)
            if kind == "integer"
            else (rng.integers(118, 124, shape, np.uint8))
        )
    if kind == "integer":
        s = 2.0 ** rng.integers(-1, 2, shape)
    else:
        s = 0.02 * np.exp(0.5 * rng.standard_normal(shape))
    if inst.table == "linear_signed":  # half of AutoRound's scales are negative
        s = s * rng.choice([-1.0, 1.0], shape)
    return to_storage(s, inst.scale)


def _placed(rng: np.random.Generator, array: np.ndarray | None) -> np.ndarray | None:
    """The array in memory of its own, half of the time at an odd address: MLX does not align."""
    if array is None or rng.random() < 0.5:
        return array
    shifted = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    shifted[...] = array
    return shifted


def random_part(
    rng: np.random.Generator,
    inst: Instance,
    rows: int,
    columns: int,
    group: int,
    kind: str = "integer",
) -> Part:
    """A part with random codes, scales, biases and codebook; every code occurs, rows allowing."""
    if inst.table == "plain":
        w = (
            rng.integers(-8, 9, (rows, columns))
            if kind == "integer"
            else (0.05 * rng.standard_normal((rows, columns)))
        )
        raw = to_storage(w.astype(np.float32), inst.scale)
        return Part(inst, rows, columns, _placed(rng, raw.view(np.uint8).reshape(rows, -1)))
    codes = rng.integers(0, 1 << inst.bits, (rows, columns))
    scale = _scale(rng, inst, (rows, columns // group), kind)
    if inst.table == "e2m1_gguf":
        return Part(inst, rows, group, _placed(rng, pack_gguf(codes, scale)))
    bias = codebook = None
    if inst.table == "linear":
        b = (
            rng.integers(-8, 9, scale.shape)
            if kind == "integer"
            else (-0.02 * (1 << inst.bits) / 2 * rng.random(scale.shape))
        )
        bias = to_storage(b, inst.scale)
    if inst.table == "codebook":
        size = 1 << inst.bits
        codebook = (
            (rng.permutation(4 * size)[:size] - 2 * size) * 0.5
            if kind == "integer"
            else (np.sort(rng.standard_normal(size)))
        )
        codebook = np.ascontiguousarray(codebook, np.float32)
    arrays = [_placed(rng, a) for a in (pack_bits(codes, inst.bits), scale, bias)]
    return Part(inst, rows, group, *arrays, codebook)


def groups_of(inst: Instance, columns: int) -> list[int]:
    """Group sizes worth testing for ``columns``; the last is one scale per row."""
    if inst.table == "plain":
        return [columns]
    if inst.scale == "e8m0":
        return [32]
    return [g for g in (32, 64, 128) if columns % g == 0 and columns > g] + [columns]


def random_weight(
    rng: np.random.Generator,
    inst: Instance | list[Instance],
    rows: int | list[int],
    columns: int,
    *,
    group: int = 0,
    experts: int = 1,
    kind: str = "integer",
) -> Weight:
    """A weight of ``experts`` experts, part i with ``rows[i]`` rows of ``inst[i % len(inst)]``.

    ``group`` 0 takes the smallest that the instance and ``columns`` allow.
    """
    insts = [inst] if isinstance(inst, Instance) else list(inst)
    sizes = [rows] if isinstance(rows, int) else list(rows)
    grid = []
    for e in range(experts):
        line = []
        for i, n in enumerate(sizes):
            one = insts[(e + i) % len(insts)]
            line.append(
                random_part(rng, one, n, columns, group or groups_of(one, columns)[0], kind)
            )
        grid.append(tuple(line))
    return Weight(columns, tuple(grid))


def magnitude(weight: Weight) -> Weight:
    """The weight whose values bound the terms a kernel may add: |scale|, |bias| and |codebook|.

    ``linear_signed`` becomes ``linear``: a kernel may sum code * x and 2^(bits-1) * x apart.
    """

    def absolute(a: np.ndarray | None, dtype: str) -> np.ndarray | None:
        if a is None or dtype == "e8m0":
            return a
        return np.abs(a) if dtype == "f32" else a & 0x7FFF

    def one(p: Part) -> Part:
        table, bits, dtype = p.instance
        if table == "plain":
            return p
        scale, bias = absolute(p.scale, dtype), absolute(p.bias, dtype)
        if table == "linear_signed":
            half = reference.widen(scale, dtype) * np.float32(1 << (bits - 1))
            return replace(
                p,
                instance=Instance("linear", bits, dtype),
                scale=scale,
                bias=to_storage(half, dtype),
            )
        book = None if p.codebook is None else np.abs(p.codebook)
        return replace(p, scale=scale, bias=bias, codebook=book)

    return replace(weight, parts=tuple(tuple(one(p) for p in e) for e in weight.parts))


def values(weight: Weight) -> np.ndarray:
    """The stored numbers, f64 ``[experts, rows, columns]``."""
    rows = np.arange(weight.experts * weight.rows)
    w = reference.dequantize(weight, rows).astype(np.float64)
    return w.reshape(weight.experts, weight.rows, weight.columns)


# ---- cases ----


def qmatmul_bound(x: np.ndarray, weight: Weight, y: np.ndarray, dtype: str) -> np.ndarray:
    """`rounding_bound` of ``y[r, a?, n] = x @ W^T`` for whatever order a kernel adds in.

    No order makes a chain longer than its number of terms: ``columns`` products and sums, and four
    more for scale, bias, their product and the join of groups.
    """
    terms = np.abs(x) @ np.abs(values(magnitude(weight))).reshape(-1, weight.columns).T
    return rounding_bound(terms, weight.columns + 4, y, dtype)


#: Numpy dtypes of activations; bf16 goes through torch and MLX arrays.
FLOATS = ("float32", "float16")


def _integers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return rng.integers(-4, 5, shape).astype(dtype)


def columns_of(inst: Instance) -> tuple[int, ...]:
    """Widths that leave a tail after every vector and every byte, where the instance allows one."""
    if inst.scale == "e8m0":
        return (32, 160, 416)
    if inst.table == "linear":
        return (32, 192, 640)
    if inst.table == "codebook":
        return (128, 384) if inst.scale == "f32" else (128, 208, 768)
    return (43, 128, 200) if inst.table == "plain" else (40, 43, 192)


def qmatmul_cases(
    inst: Instance, kind: str, seed: int = 0, dtype: str = "float32"
) -> Iterator[Case]:
    """`ops.qmatmul` of one instance: tails of rows and columns, several tokens, experts, parts."""
    rng = np.random.default_rng([seed, sum(map(ord, str(inst))), kind == "integer"])
    shapes = [(n, t, 0) for n in (1, 7, 34) for t in (1, 3)] + [(33, 17, 0), (19, 2, 3), (6, 9, 5)]
    for i, (rows, tokens, experts) in enumerate(shapes):
        columns = columns_of(inst)[i % len(columns_of(inst))]
        groups = groups_of(inst, columns)
        group = groups[i % len(groups)]
        sizes = [rows] if i % 2 else [rows, 5]
        w = random_weight(
            rng, inst, sizes, columns, group=group, experts=max(experts, 1), kind=kind
        )
        x = (
            _integers(rng, (tokens, columns), dtype)
            if kind == "integer"
            else (rng.standard_normal((tokens, columns)).astype(dtype))
        )
        expert = rng.integers(0, experts, (tokens, 2)).astype(np.int32) if experts else None
        label = f"k={columns} n={w.rows} t={tokens} group={group} experts={experts} {dtype}"
        yield qmatmul_case(inst, kind, label, x, w, expert)


def qmatmul_case(
    inst: Instance | None,
    kind: str,
    label: str,
    x: np.ndarray,
    w: Weight,
    expert: np.ndarray | None,
) -> Case:
    """One call of `ops.qmatmul` against the f64 product with the stored numbers."""
    store = {"float32": "f32", "float16": "f16"}[x.dtype.name]
    x64 = x.astype(np.float64)
    every = x64 @ values(w).reshape(-1, w.columns).T
    bound = qmatmul_bound(x64, w, every, store)

    def chosen(a: np.ndarray) -> np.ndarray:
        if expert is None:
            return a
        return np.take_along_axis(a.reshape(len(x), w.experts, w.rows), expert[..., None], 1)

    return Case(
        "qmatmul", "exact" if kind == "integer" else "bound", label, inst,
        lambda: (ops.qmatmul(x, w, expert=expert),),
        (rounded(chosen(every), store) if kind == "integer" else chosen(every),),
        None if kind == "integer" else (chosen(bound),),
    )  # fmt: skip


def dequantize_cases(inst: Instance, seed: int = 0) -> Iterator[Case]:
    """`ops.dequantize` of one instance: rows in any order, f32 bit for bit, f16 rounded once."""
    rng = np.random.default_rng([seed, sum(map(ord, str(inst)))])
    for kind, dtype in (("integer", "float32"), ("gaussian", "float32"), ("gaussian", "float16")):
        for columns in columns_of(inst):
            group = groups_of(inst, columns)[-1]
            w = random_weight(rng, inst, [7, 4], columns, group=group, experts=3, kind=kind)
            rows = rng.integers(0, 33, 13)
            want = reference.dequantize(w, rows).astype(dtype)
            run = partial(ops.dequantize, w, rows, dtype=np.dtype(dtype))
            label = f"k={columns} group={group} {kind} {dtype}"
            yield Case("dequantize", "exact", label, inst, lambda run=run: (run(),), (want,))


#: (columns, block, which signs, inverse) of the rotations tested: TQ's, JANGTQ's and the extremes.
ROTATIONS = (
    (1, None, "", False),
    (13, None, "pre", False),
    (512, None, "pre", False),
    (768, None, "pre", True),
    (2048, None, "pre", False),
    (300, 128, "pre post", False),
    (512, 128, "pre post", True),
    (64, 16, "post", False),
    (5, 4, "pre", False),
    (16384, 16384, "", False),
)


def hadamard_cases(seed: int = 0, dtype: str = "float32") -> Iterator[Case]:
    """`ops.hadamard`, bit for bit the reference: tails, both signs, inverse."""
    rng = np.random.default_rng(seed)
    for columns, block, signs, inverse in ROTATIONS:
        width = ops.rotated_columns(columns, block)
        period = block or width
        pre, post = (
            rng.choice(np.float32([-1, 1]), period) if side in signs.split() else None
            for side in ("pre", "post")
        )
        x = rng.standard_normal((3, columns)).astype(dtype)
        first, last = (post, pre) if inverse else (pre, post)
        want = reference.hadamard(x, block=block or 0, pre=first, post=last).astype(dtype)
        run = partial(ops.hadamard, x, block=block, pre=pre, post=post, inverse=inverse)
        label = f"k={columns} block={block} {signs} inverse={inverse} {dtype}"
        yield Case("hadamard", "exact", label, None, lambda run=run: (run(),), (want,))


#: b, t, hk, hv, dk, dv, taps: the model's heads, tails of every vector.
DELTAS = ((1, 3, 1, 2, 128, 128, 4), (2, 4, 2, 4, 16, 24, 4), (3, 2, 1, 3, 5, 150, 3))


def gated_delta_arrays(rng, b, t, hk, hv, dk, dv, taps) -> dict[str, np.ndarray]:
    """Random f32 arguments of `ops.gated_delta`, by name and in its order."""
    c = 2 * hk * dk + hv * dv
    arrays = {
        "proj": rng.standard_normal((b, t, c + hv * dv + 2 * hv)),
        "conv_weight": 0.5 * rng.standard_normal((c, taps)),
        "a_log": np.log(rng.uniform(0.01, 16, hv)),
        "dt_bias": rng.standard_normal(hv),
        "norm": rng.uniform(0.5, 1.5, dv),
        "conv_state": rng.standard_normal((b, c, taps)),
        "state": 0.1 * rng.standard_normal((b, hv, dk, dv)),
    }
    return {name: a.astype(np.float32) for name, a in arrays.items()}


def gated_delta_cases(seed: int = 0) -> Iterator[Case]:
    """`ops.gated_delta` in f32 within its running error bound; the conv state bit for bit."""
    rng = np.random.default_rng(seed)
    for shape in DELTAS:
        arrays = gated_delta_arrays(rng, *shape)
        y, state = rounding.gated_delta(**arrays, hk=shape[2], eps=1e-6)
        _, conv_state, _ = reference.gated_delta(**arrays, hk=shape[2], eps=1e-6)

        def run(arrays=arrays, shape=shape) -> tuple[np.ndarray, ...]:
            fresh = {k: a.copy() for k, a in arrays.items()}
            y = ops.gated_delta(*fresh.values(), heads=shape[2:4], head_dims=shape[4:6], eps=1e-6)
            return y, fresh["conv_state"], fresh["state"]

        label = "b={} t={} hk={} hv={} dk={} dv={} taps={}".format(*shape)
        want, bound = (y.value, conv_state, state.value), (y.error, 0 * conv_state, state.error)
        yield Case("gated_delta", "bound", label, None, run, want, bound)


def slice_rows(part: Part, begin: int, end: int) -> Part:
    """Rows [begin, end) of a part; views, nothing is copied."""
    end = min(end, part.rows)
    scale, bias = (None if a is None else a[begin:end] for a in (part.scale, part.bias))
    return replace(part, rows=end - begin, codes=part.codes[begin:end], scale=scale, bias=bias)


def by_op_and_instance(
    seed: int = 0,
) -> Iterator[tuple[tuple[str, Instance | None], list[Case]]]:
    """Every op with every instance of this build: ((op, instance or None), its cases)."""
    yield ("hadamard", None), [c for t in FLOATS for c in hadamard_cases(seed, t)]
    yield ("gated_delta", None), list(gated_delta_cases(seed))
    for inst in ops.instances():
        yield ("dequantize", inst), list(dequantize_cases(inst, seed))
    for inst in ops.instances():
        both = [
            c
            for kind, t in (
                ("integer", "float32"),
                ("gaussian", "float32"),
                ("gaussian", "float16"),
            )
            for c in qmatmul_cases(inst, kind, seed, t)
        ]
        yield ("qmatmul", inst), both
