"""Which tensor is stored how, in each of the five published checkpoints.

Scales are chosen so that every matrix keeps the RMS of its input (entries of standard deviation
1 / sqrt(columns)), as far as uniformly random codes allow, so activations stay finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from .fill import Fill, Tensor
from .shape import Matrix, Shape, Vector, vision_tower

CODES = Fill("codes")
#: RMS of a codebook under uniformly random codes, in units of 1 / sqrt(rotation length).
UNIFORM_RMS = {2: 1.126, 3: 1.329, 4: 1.463}
E2M1_RMS = 2.926

#: W4A16 keeps this many experts in int8; here one in each fifth of the layers.
SUPER_EXPERTS = 5


def _std(m: Matrix) -> float:
    return 1 / math.sqrt(m.columns)


def _stack(m: Matrix, *dims: int) -> tuple[int, ...]:
    return (m.experts, *dims) if m.routed else dims


def _spread(value: float) -> Fill:
    """Between 3/4 and 5/4 of a value."""
    return Fill("uniform", 0.75 * value, 0.5 * value)


def dense(name: str, m: Matrix, dtype: str, suffix: str = ".weight") -> Iterator[Tensor]:
    """The matrix as it is, one number per weight."""
    yield Tensor(
        name + suffix, dtype, _stack(m, m.rows, m.columns), Fill("normal", 0, _std(m)), name
    )


def affine(name: str, m: Matrix, bits: int, dtype: str, group: int = 64) -> Iterator[Tensor]:
    """MLX affine: w = scale * code + bias, bias = -scale * (2^bits - 1) / 2."""
    top = 2**bits - 1
    scale = _spread(_std(m) / math.sqrt((4**bits - 1) / 12))
    bias = replace(scale, a=-scale.a * top / 2, b=-scale.b * top / 2)
    groups = _stack(m, m.rows, m.columns // group)
    yield Tensor(f"{name}.weight", "U32", _stack(m, m.rows, m.columns * bits // 32), CODES, name)
    yield Tensor(f"{name}.scales", dtype, groups, scale, name)
    yield Tensor(f"{name}.biases", dtype, groups, bias, name)


def mxfp4(name: str, m: Matrix) -> Iterator[Tensor]:
    """MXFP4 as MLX stores it: E2M1 codes and one E8M0 per 32 columns."""
    scale = _std(m) / E2M1_RMS
    low = math.floor(math.log2(scale))
    # powers of two only: mix two neighbours so that the mean square is the scale's
    exponent = Fill("exponent", 127 + low, (scale**2 / 4**low - 1) / 3)
    yield Tensor(f"{name}.weight", "U32", _stack(m, m.rows, m.columns // 8), CODES, name)
    yield Tensor(f"{name}.scales", "U8", _stack(m, m.rows, m.columns // 32), exponent, name)


def tq(name: str, m: Matrix, bits: int) -> Iterator[Tensor]:
    """turboquant-vllm: one f32 norm per 128 columns, rows of every expert flattened."""
    rows, groups = m.rows * max(1, m.experts), -(-m.columns // 128)
    norm = _spread(_std(m) * math.sqrt(128) / UNIFORM_RMS[bits])
    yield Tensor(f"{name}.tq_packed", "U8", (rows * groups, 16 * bits), CODES, name)
    yield Tensor(f"{name}.tq_norms", "F32", (rows, groups), norm, name)


def jangtq(name: str, m: Matrix, bits: int) -> Iterator[Tensor]:
    """JANGTQ: one f16 norm per row; u = w / norm lies on the unit sphere."""
    norm = _spread(_std(m) * math.sqrt(m.columns) / UNIFORM_RMS[bits])
    packed = _stack(m, m.rows, m.columns * bits // 32)
    yield Tensor(f"{name}.tq_packed", "U32", packed, CODES, name)
    yield Tensor(f"{name}.tq_norms", "F16", _stack(m, m.rows), norm, name)
    yield Tensor(f"{name}.tq_bits", "U8", (1,), Fill("bytes", data=bytes([bits])), name)


def compressed(name: str, m: Matrix, bits: int, group: int) -> Iterator[Tensor]:
    """compressed-tensors pack-quantized: w = scale * (code - 2^(bits-1))."""
    scale = _spread(_std(m) / math.sqrt((4**bits - 1) / 12))
    shape = m.rows.to_bytes(8, "little") + m.columns.to_bytes(8, "little")
    yield Tensor(f"{name}.weight_packed", "I32", (m.rows, m.columns * bits // 32), CODES, name)
    yield Tensor(f"{name}.weight_scale", "BF16", (m.rows, m.columns // group), scale, name)
    yield Tensor(f"{name}.weight_shape", "I64", (2,), Fill("bytes", data=shape), name)


def vector(name: str, v: Vector, dtype: str, *, mlx: bool = False) -> Tensor:
    """A small parameter; ``mlx``: norms stored as 1 + w, convolution as [channels, taps, 1]."""
    fill = {
        "norm": Fill("uniform", 0.95 if mlx else -0.05, 0.1),
        "gain": Fill("uniform", 0.95, 0.1),
        "conv": Fill("normal", 0, 0.5),
        "a_log": Fill("uniform", 0, math.log(16)),
        "dt_bias": Fill("uniform", -6, 4),
    }[v.kind]
    shape = v.shape
    if mlx and v.kind == "conv":
        shape = (shape[0], shape[2], shape[1])
    return Tensor(name, dtype, shape, fill, name)


def vision(
    shape: Shape, prefix: str, dtype: str, *, mlx: bool, packed: bool = False
) -> Iterator[Tensor]:
    """The vision tower; ``packed``: attention matrices as TQ3, as turboquant-vllm stores them."""
    for name, dims in vision_tower(shape):
        full = f"{prefix}.{name}"
        m = Matrix(full, dims[0], dims[1]) if len(dims) == 2 else None
        if m and packed and ".attn." in name:
            yield from tq(full, m, 3)
            continue
        if mlx and name == "patch_embed.proj.weight":
            dims = (dims[0], *dims[2:], dims[1])
        columns = math.prod(dims[1:]) if len(dims) > 1 else 0
        fill = Fill("normal", 0, 1 / math.sqrt(columns) if columns else 0.02)
        if "norm" in name and name.endswith("weight"):
            fill = Fill("uniform", 0.95, 0.1)
        yield Tensor(full, dtype, dims, fill, full)


def _mlx_name(path: str) -> str:
    if path.startswith("lm_head"):
        return f"language_model.{path}"
    return f"language_model.model.{path.replace('.experts.', '.switch_mlp.')}"


def _hub_name(path: str) -> str:
    if path.startswith(("lm_head", "mtp.")):
        return path
    return f"model.language_model.{path}"


def config_i(p: Matrix | Vector, shape: Shape) -> Iterator[Tensor]:
    """MLX affine g64: 8 bits at both ends, else gate/up 2, down 3, attention and delta net 4."""
    name = _mlx_name(p.path)
    if isinstance(p, Vector):
        yield vector(name, p, "BF16", mlx=True)
    elif p.role in ("gate", "shared_expert_gate"):
        yield from dense(name, p, "BF16")
    else:
        mid = p.layer is not None and 2 <= p.layer < shape.layers - 2
        bits = {"gate_proj": 2, "up_proj": 2, "down_proj": 3}.get(p.role, 4) if mid else 8
        yield from affine(name, p, bits, "BF16")


_MXFP4_AFFINE = {"down_proj": 5, "q_proj": 6, "k_proj": 6, "v_proj": 6, "in_proj_qkv": 6}
_MXFP4_AFFINE |= {
    "in_proj_z": 6,
    "embed_tokens": 6,
    "lm_head": 8,
    "gate": 8,
    "shared_expert_gate": 8,
}


def mxfp4_node(p: Matrix | Vector, shape: Shape) -> Iterator[Tensor]:
    """mlx-node's assignment: gate/up MXFP4, most others affine, output projections BF16."""
    name = _mlx_name(p.path)
    if isinstance(p, Vector):
        yield vector(name, p, "BF16", mlx=True)
    elif p.role in ("gate_proj", "up_proj"):
        yield from mxfp4(name, p)
    elif p.role in _MXFP4_AFFINE:
        yield from affine(name, p, _MXFP4_AFFINE[p.role], "BF16")
    else:
        yield from dense(name, p, "BF16")


def jangtq2(p: Matrix | Vector, shape: Shape) -> Iterator[Tensor]:
    """Routed experts 2-bit codebook, routers f16, other matrices affine 8-bit."""
    name = _mlx_name(p.path)
    if isinstance(p, Vector):
        yield vector(name, p, "F16")
    elif p.routed:
        yield from jangtq(name, p, 2)
    elif p.role in ("gate", "shared_expert_gate"):
        yield from dense(name, p, "F16")
    else:
        yield from affine(name, p, 8, "F16")


_TQ_SKIP = ("gate", "lm_head", "embed_tokens", "in_proj_b", "out_proj")


def tq_apex2(p: Matrix | Vector, shape: Shape) -> Iterator[Tensor]:
    """TQ3; o_proj and down_proj TQ4; router, in_proj_b, out_proj, embeddings and head f16."""
    name = _hub_name(p.path)
    if isinstance(p, Vector):
        yield vector(name, p, "F16")
        return
    if p.routed:
        if p.role == "up_proj":
            return  # gate_proj carries both
        if p.role == "gate_proj":
            p, name = replace(p, rows=2 * p.rows), name.replace("gate_proj", "gate_up_proj")
    if p.role in _TQ_SKIP:
        yield from dense(name, p, "F16")
    else:
        packed = name if p.routed else f"{name}.weight"
        yield from tq(packed, p, 4 if p.role in ("o_proj", "down_proj") else 3)


def super_experts(shape: Shape) -> frozenset[tuple[int, int]]:
    """(layer, expert) pairs stored in int8, spread over the layers that are not BF16."""
    inner = range(2, shape.layers - 1)
    count = min(SUPER_EXPERTS, len(inner))
    layers = [inner[len(inner) * i // count] for i in range(count)]
    return frozenset((n, (37 * n + 5) % shape.experts) for n in layers)


def w4a16(p: Matrix | Vector, shape: Shape) -> Iterator[Tensor]:
    """Experts int4 g32 (five int8), attention int8 g128; layers 0, 1, last and MTP BF16."""
    name = _hub_name(p.path)
    if isinstance(p, Vector):
        yield vector(name, p, "BF16")
        return
    inner = p.layer is not None and 2 <= p.layer < shape.layers - 1
    if p.routed and p.layer == -1:
        if p.role == "gate_proj":
            fused = replace(p, rows=2 * p.rows)
            yield from dense(name.replace("gate_proj", "gate_up_proj"), fused, "BF16", "")
        elif p.role == "down_proj":
            yield from dense(name, p, "BF16", "")
    elif p.routed:
        supers = super_experts(shape)
        head, tail = name.rsplit(".", 1)
        for e in range(p.experts):
            one, path = replace(p, experts=0), f"{head}.{e}.{tail}"
            if not inner:
                yield from dense(path, one, "BF16")
            elif (p.layer, e) in supers:
                yield from compressed(path, one, 8, 128)
            else:
                yield from compressed(path, one, 4, 32)
    elif inner and ".self_attn." in name:
        yield from compressed(name, p, 8, 128)
    else:
        yield from dense(name, p, "BF16")
