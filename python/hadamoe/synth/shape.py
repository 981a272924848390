"""The model's dimensions and the matrices it is made of, without any format's names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..errors import ContractError


@dataclass(frozen=True, slots=True)
class VisionShape:
    """Dimensions of the vision tower (defaults: Qwen3.6-35B-A3B)."""

    depth: int = 27
    hidden: int = 1152
    intermediate: int = 4304
    heads: int = 16
    positions: int = 2304
    patch: int = 16
    temporal: int = 2
    merge: int = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """Dimensions of a `qwen3_5_moe` text model (defaults: Qwen3.6-35B-A3B).

    Every ``interval``-th layer is full attention, the others are gated delta nets.
    """

    layers: int = 40
    hidden: int = 2048
    heads: int = 16
    kv_heads: int = 2
    head_dim: int = 256
    key_heads: int = 16
    value_heads: int = 32
    key_dim: int = 128
    value_dim: int = 128
    conv: int = 4
    experts: int = 256
    top_k: int = 8
    moe: int = 512
    vocab: int = 248_320
    interval: int = 4
    vision: VisionShape = field(default_factory=VisionShape)

    def __post_init__(self) -> None:
        for name in ("hidden", "moe", "heads_width", "value_width"):
            if getattr(self, name) % 128:
                raise ContractError(f"Shape: {name}={getattr(self, name)}, needs a multiple of 128")
        if not 1 <= self.top_k <= self.experts or self.layers < 1 or self.vocab < 320:
            raise ContractError(
                f"Shape: layers={self.layers} experts={self.experts} top_k={self.top_k} "
                f"vocab={self.vocab}, needs layers >= 1, 1 <= top_k <= experts, vocab >= 320"
            )

    @property
    def heads_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def value_width(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def qkv_width(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.value_width

    def is_attention(self, layer: int) -> bool:
        return layer % self.interval == self.interval - 1


#: Small enough for tests, yet with both layer kinds and every role of every format.
TINY = Shape(
    layers=8,
    hidden=256,
    heads=4,
    kv_heads=2,
    head_dim=64,
    key_heads=2,
    value_heads=4,
    key_dim=64,
    value_dim=64,
    experts=8,
    top_k=2,
    moe=128,
    vocab=512,
    vision=VisionShape(2, 64, 96, 2, 16),
)
PRESETS = {"full": Shape(), "tiny": TINY}


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear, an embedding or (``experts`` > 0) a stack of experts of ``rows`` x ``columns``.

    ``path`` is the neutral module path (``layers.3.self_attn.q_proj``); ``layer`` is None outside
    the layers and -1 in the MTP head.
    """

    path: str
    rows: int
    columns: int
    layer: int | None = None
    experts: int = 0

    @property
    def role(self) -> str:
        """Last part of the path, e.g. ``q_proj``; ``gate`` is the router."""
        return self.path.rsplit(".", 1)[-1]

    @property
    def routed(self) -> bool:
        return self.experts > 0


@dataclass(frozen=True, slots=True)
class Vector:
    """A small parameter no format quantizes; ``kind`` says how it is filled."""

    path: str
    shape: tuple[int, ...]
    kind: str  # norm (zero-centred in the hub's files), gain (ones), conv, a_log, dt_bias


def _mlp(shape: Shape, prefix: str, layer: int) -> Iterator[Matrix]:
    h, i, e = shape.hidden, shape.moe, shape.experts
    yield Matrix(f"{prefix}.mlp.gate", e, h, layer)
    for stack, name in ((e, "experts"), (0, "shared_expert")):
        yield Matrix(f"{prefix}.mlp.{name}.gate_proj", i, h, layer, stack)
        yield Matrix(f"{prefix}.mlp.{name}.up_proj", i, h, layer, stack)
        yield Matrix(f"{prefix}.mlp.{name}.down_proj", h, i, layer, stack)
    yield Matrix(f"{prefix}.mlp.shared_expert_gate", 1, h, layer)


def _attention(shape: Shape, prefix: str, layer: int) -> Iterator[Matrix | Vector]:
    h, kv = shape.hidden, shape.kv_heads * shape.head_dim
    p = f"{prefix}.self_attn"
    yield Matrix(f"{p}.q_proj", 2 * shape.heads_width, h, layer)  # query and output gate
    yield Matrix(f"{p}.k_proj", kv, h, layer)
    yield Matrix(f"{p}.v_proj", kv, h, layer)
    yield Matrix(f"{p}.o_proj", h, shape.heads_width, layer)
    yield Vector(f"{p}.q_norm.weight", (shape.head_dim,), "norm")
    yield Vector(f"{p}.k_norm.weight", (shape.head_dim,), "norm")


def _delta_net(shape: Shape, prefix: str, layer: int) -> Iterator[Matrix | Vector]:
    h, v = shape.hidden, shape.value_heads
    p = f"{prefix}.linear_attn"
    yield Matrix(f"{p}.in_proj_qkv", shape.qkv_width, h, layer)
    yield Matrix(f"{p}.in_proj_z", shape.value_width, h, layer)
    yield Matrix(f"{p}.in_proj_b", v, h, layer)
    yield Matrix(f"{p}.in_proj_a", v, h, layer)
    yield Matrix(f"{p}.out_proj", h, shape.value_width, layer)
    yield Vector(f"{p}.conv1d.weight", (shape.qkv_width, 1, shape.conv), "conv")
    yield Vector(f"{p}.A_log", (v,), "a_log")
    yield Vector(f"{p}.dt_bias", (v,), "dt_bias")
    yield Vector(f"{p}.norm.weight", (shape.value_dim,), "gain")


def _layer(shape: Shape, prefix: str, layer: int, attention: bool) -> Iterator[Matrix | Vector]:
    yield Vector(f"{prefix}.input_layernorm.weight", (shape.hidden,), "norm")
    yield from (_attention if attention else _delta_net)(shape, prefix, layer)
    yield Vector(f"{prefix}.post_attention_layernorm.weight", (shape.hidden,), "norm")
    yield from _mlp(shape, prefix, layer)


def text_model(shape: Shape) -> Iterator[Matrix | Vector]:
    """Every parameter of the language model, in file order."""
    yield Matrix("lm_head", shape.vocab, shape.hidden)
    yield Matrix("embed_tokens", shape.vocab, shape.hidden)
    for n in range(shape.layers):
        yield from _layer(shape, f"layers.{n}", n, shape.is_attention(n))
    yield Vector("norm.weight", (shape.hidden,), "norm")


def mtp_head(shape: Shape) -> Iterator[Matrix | Vector]:
    """The multi-token prediction head: one full-attention layer behind a projection."""
    yield Matrix("mtp.fc", shape.hidden, 2 * shape.hidden, -1)
    yield from _layer(shape, "mtp.layers.0", -1, attention=True)
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        yield Vector(f"mtp.{name}.weight", (shape.hidden,), "norm")


def vision_tower(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of the vision tower's tensors in the hub's layout."""
    v, out = shape.vision, shape.hidden
    h, merged = v.hidden, v.hidden * v.merge**2
    yield "patch_embed.proj.weight", (h, 3, v.temporal, v.patch, v.patch)
    yield "patch_embed.proj.bias", (h,)
    yield "pos_embed.weight", (v.positions, h)
    sizes = [("attn.qkv", 3 * h, h), ("attn.proj", h, h)]
    sizes += [("mlp.linear_fc1", v.intermediate, h), ("mlp.linear_fc2", h, v.intermediate)]
    for n in range(v.depth):
        for name, rows, columns in sizes:
            yield f"blocks.{n}.{name}.weight", (rows, columns)
            yield f"blocks.{n}.{name}.bias", (rows,)
        for name in ("norm1", "norm2"):
            yield f"blocks.{n}.{name}.weight", (h,)
            yield f"blocks.{n}.{name}.bias", (h,)
    yield "merger.norm.weight", (h,)
    yield "merger.norm.bias", (h,)
    for name, rows, columns in (("linear_fc1", merged, merged), ("linear_fc2", out, merged)):
        yield f"merger.{name}.weight", (rows, columns)
        yield f"merger.{name}.bias", (rows,)
