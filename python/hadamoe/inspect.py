"""What a checkpoint directory holds and what running it takes: the numbers of `hadamoe inspect`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

from . import formats
from .formats import ModelFiles
from .weight import Instance, Part

_LAYER = re.compile(r"^layers\.\d+\.")
#: module path without its layer -> role, in the order a token meets them
_ROLES = {
    "embed_tokens": "embeddings",
    "linear_attn.in_proj_qkv": "delta net in (qkv, z)",
    "linear_attn.in_proj_z": "delta net in (qkv, z)",
    "linear_attn.in_proj_b": "delta net in (b, a)",
    "linear_attn.in_proj_a": "delta net in (b, a)",
    "linear_attn.out_proj": "delta net out",
    "self_attn.q_proj": "attention q, k, v",
    "self_attn.k_proj": "attention q, k, v",
    "self_attn.v_proj": "attention q, k, v",
    "self_attn.o_proj": "attention out",
    "mlp.gate": "router",
    "mlp.experts.gate_up": "experts gate, up",
    "mlp.experts.down": "experts down",
    "mlp.shared_expert_gate": "shared expert's gate",
    "mlp.shared_expert.gate_proj": "shared expert gate, up",
    "mlp.shared_expert.up_proj": "shared expert gate, up",
    "mlp.shared_expert.down_proj": "shared expert down",
    "lm_head": "head",
}
_ORDER = [*dict.fromkeys(_ROLES.values()), "vision linears"]


@dataclass
class Row:
    """All blocks of rows of one role that are stored alike.

    Attributes:
        role: what they do in the model.
        instance: table, bits and scale dtype.
        group: columns per scale; "row" for one scale per (wide) row, None for plain numbers.
        rotated: whether the input goes through a Hadamard rotation first.
        count: number of matrices (each expert counts).
        parameters: weights, without padding.
        nbytes: codes, scales and biases in the files.
        token_bytes: of these, read per decoded token (experts: top-k of E; embeddings: one row).
    """

    role: str
    instance: Instance
    group: int | str | None
    rotated: bool
    count: int = 0
    parameters: int = 0
    nbytes: int = 0
    token_bytes: float = 0.0


@dataclass
class Report:
    """What `describe` found.

    Attributes:
        path, format, evidence: which directory, which format, and why it is that.
        rows: table by role.
        parameters, nbytes: of the text model's matrices and small tensors.
        file_bytes: of all weight files.
        tensors: tensors in the files, every one of them claimed.
        vision: (tensors, bytes) of the vision tower.
        mtp: tensors of multi-token prediction, present and unused.
        kv_scales, kv_scales_ignored: usable scales of a quantised KV cache; names of invalid ones.
        layers, experts, top_k, hidden: the architecture in four numbers.
        notes: remarks on the files.
    """

    path: str
    format: str
    evidence: list[str]
    layers: int
    experts: int
    top_k: int
    hidden: int
    file_bytes: int
    tensors: int
    vision: tuple[int, int]
    mtp: int
    kv_scales: int
    kv_scales_ignored: list[str]
    tokenizer: bool
    notes: list[str]
    rows: list[Row] = field(default_factory=list)
    parameters: int = 0
    nbytes: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the text model over its parameters."""
        return 8 * self.nbytes / self.parameters

    @property
    def token_bytes(self) -> int:
        """Bytes of weights read per decoded token, batch 1."""
        return round(sum(r.token_bytes for r in self.rows))

    @property
    def instances(self) -> list[Instance]:
        """Every kernel instance this checkpoint needs, sorted."""
        return sorted({r.instance for r in self.rows})

    def missing(self, available: Iterable[Instance]) -> list[Instance]:
        """Needed instances that are not among ``available`` (``hadamoe.ops.instances()``)."""
        have = set(available)
        return [i for i in self.instances if i not in have]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the attributes and the properties above."""
        out = asdict(self)
        for row, source in zip(out["rows"], self.rows, strict=True):
            row["instance"] = str(source.instance)
        out["instances"] = [str(i) for i in self.instances]
        out["bits_per_weight"], out["token_bytes"] = self.bits_per_weight, self.token_bytes
        return out


def describe(path: str | PathLike[str], *, verify: bool = False) -> Report:
    """Read a directory's headers and say what is in it; ``verify`` also reads every scale.

    Raises: FormatError and UnsupportedError as `formats.read`.
    """
    model = formats.read(path)
    if verify:
        model.verify()
    return report(model)


def report(model: ModelFiles) -> Report:
    """`describe` for a checkpoint that is already read."""
    g = model.geometry
    quantised_vision = [w for p, w in model.weights.items() if p.startswith("visual.")]
    out = Report(
        path=str(model.checkpoint.path), format=model.format, evidence=model.evidence,
        layers=len(g.layer_types), experts=g.experts, top_k=g.top_k, hidden=g.hidden,
        file_bytes=model.checkpoint.nbytes, tensors=len(model.checkpoint),
        vision=(
            len(model.vision) + len(quantised_vision),
            sum(s.array.nbytes for s in model.vision.values())
            + sum(w.nbytes for w in quantised_vision),
        ),
        mtp=len(model.mtp), kv_scales=len(model.kv_scales) - len(model.kv_scales_ignored),
        kv_scales_ignored=model.kv_scales_ignored, tokenizer=model.tokenizer, notes=model.notes,
    )  # fmt: skip
    rows: dict[tuple[Any, ...], Row] = {}
    for path, weight in model.weights.items():
        tied = path == "lm_head" and weight is model.weights["embed_tokens"]
        role = "vision linears" if path.startswith("visual.") else _ROLES[_LAYER.sub("", path)]
        for expert in weight.parts:
            for part in expert:
                group = _group(part)
                rotated = weight.rotation is not None
                key = (role, part.instance, group, rotated)
                row = rows.setdefault(key, Row(*key))
                row.token_bytes += part.nbytes * _share(role, part, g.experts, g.top_k)
                if not tied:
                    row.count += 1
                    row.parameters += part.rows * weight.in_features
                    row.nbytes += part.nbytes
    out.rows = sorted(rows.values(), key=lambda r: (_ORDER.index(r.role), r.instance, str(r.group)))
    text = [r for r in out.rows if r.role != "vision linears"]
    small = sum(a.size for a in model.tensors.values())
    out.parameters = small + sum(r.parameters for r in text)
    out.nbytes = 2 * small + sum(
        r.nbytes for r in text
    )  # norms and the like: 16 bits in every format
    return out


def _group(part: Part) -> int | str | None:
    if part.scale is None:
        return None
    return "row" if part.group > 128 else part.group  # no format has wider groups than 128


def _share(role: str, part: Part, experts: int, top_k: int) -> float:
    """How much of a part one decoded token reads."""
    if role == "embeddings":
        return 1 / part.rows
    if role == "vision linears":
        return 0.0
    return top_k / experts if role.startswith("experts") else 1.0
