"""Walk the architecture, ask the reader for each weight, leave no tensor unexplained."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..bf16 import from_bf16
from ..checkpoint import Checkpoint
from ..errors import ContractError, FormatError, UnsupportedError
from ..weight import Instance, Weight, fuse_rows, stack_experts
from .config import Geometry, Vision
from .grid import plain
from .names import FLOATS, Files, as_f32, check_finite

#: module path, rows, columns, number of experts (None: one 2-D matrix) -> weight, or None if not
#: quantised
Matrix = Callable[[str, int, int, "int | None"], "Weight | None"]

# A multi-token-prediction layer is claimed but not used: only its modules' names are checked.
_MTP = re.compile(
    r"mtp\.(?:(?:fc|norm|pre_fc_norm_embedding|pre_fc_norm_hidden)|layers\.\d+\."
    r"(?:input_layernorm|post_attention_layernorm|self_attn\.(?:[qkvo]_proj|[qk]_norm)"
    r"|mlp\.(?:gate|shared_expert_gate|shared_expert\.(?:gate|up|down)_proj"
    r"|experts\.(?:\d+\.)?(?:gate_up|gate|up|down)_proj)))\.\w+$"
)
_KV_SCALE = re.compile(
    r"layers\.(\d+)\.self_attn\.(?:(?:attn\.|[qkv]_proj\.)?([qkv])_scale|(kv)_scale)$"
)


class Stored(NamedTuple):
    """A plain tensor as stored: ``dtype`` "bf16" (array: its bits as u16), "f16" or "f32"."""

    dtype: str
    array: np.ndarray

    def f32(self) -> np.ndarray:
        """A copy in f32."""
        if self.dtype == "bf16":
            return from_bf16(self.array)
        return self.array.astype(np.float32)


@dataclass
class ModelFiles:
    """What a checkpoint directory holds, in one vocabulary whatever its format.

    Attributes:
        format: "mlx-affine", "mxfp4", "tq", "jangtq", "compressed-tensors", "bf16", "f16" or "f32".
        evidence: why, one line each.
        config: HF-style dict for ``Qwen3_5MoeConfig(**config)``: text_config with rope_parameters
            merged,
            vision_config where present, no quantisation keys.
        geometry: the sizes in config, checked.
        weights: matrices by module path (``layers.3.self_attn.q_proj``; experts fused, gate rows
            first).
        tensors: small f32 arrays by module path; norms as the factor that multiplies (1 + w where
            the
            file stores w), conv1d ``[channels, kernel]``, A_log and dt_bias ``[value heads]``.
        vision: the vision tower's plain tensors by HF name (``visual.patch_embed.proj.weight``, HF
            layout); its quantised linears stand in ``weights``. Empty where the files have none.
        mtp: names of multi-token-prediction tensors, claimed and unused.
        kv_scales: f32 scales for a quantised KV cache by name; invalid ones replaced by 1.
        kv_scales_ignored: names of those.
        notes: remarks worth showing a person.
        tokenizer: whether the directory has tokenizer files.
        checkpoint: the mapped files; keep it as long as any view.
    """

    format: str
    evidence: list[str]
    config: dict[str, Any]
    geometry: Geometry
    checkpoint: Checkpoint
    notes: list[str]
    weights: dict[str, Weight] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    vision: dict[str, Stored] = field(default_factory=dict)
    mtp: list[str] = field(default_factory=list)
    kv_scales: dict[str, np.ndarray] = field(default_factory=dict)
    kv_scales_ignored: list[str] = field(default_factory=list)
    tokenizer: bool = False
    _files: Files | None = None

    def instances(self) -> set[Instance]:
        """Every kernel instance a run of this model needs."""
        return set().union(*(w.instances() for w in self.weights.values()))

    def scale_bytes(self) -> int:
        """Bytes `verify` would read."""
        return sum(t.array.nbytes for t in self._files.scales) if self._files else 0

    def verify(self) -> None:
        """Read every scale and bias; FormatError at the first Inf, NaN or E8M0 255."""
        if self._files is not None:
            check_finite(self._files.scales)


def assemble(model: ModelFiles, files: Files, matrix: Matrix, shifted: bool) -> None:
    """Fill a ModelFiles; every tensor is claimed, or FormatError names the first that is not.

    shifted: whether this kind of file stores norms as 1 + w when no convolution tells.
    """
    walk = _Walk(model, files, matrix)
    g = model.geometry
    walk.weight("embed_tokens", g.vocab, g.hidden)
    if g.tied and "lm_head.weight" not in files and "lm_head.tq_packed" not in files:
        model.weights["lm_head"] = model.weights["embed_tokens"]
    else:
        walk.weight("lm_head", g.vocab, g.hidden)
    walk.shift = walk.norms_need_one(shifted)
    for i, kind in enumerate(g.layer_types):
        path = f"layers.{i}"
        walk.norm(f"{path}.input_layernorm", g.hidden)
        walk.norm(f"{path}.post_attention_layernorm", g.hidden)
        if kind == "full_attention":
            walk.attention(f"{path}.self_attn")
        else:
            walk.delta_net(f"{path}.linear_attn")
        walk.moe(f"{path}.mlp")
    walk.norm("norm", g.hidden)
    if g.vision is not None and files.starting("visual."):
        walk.vision(g.vision)
    walk.mtp()
    walk.kv_scales()
    for name in files.checkpoint.unclaimed():
        t = files.checkpoint.tensor(name)
        raise FormatError(
            t.file, name, expected="only tensors of this architecture",
            found=f"one more, {t.dtype} {list(t.shape)}",
        )  # fmt: skip


class _Walk:
    def __init__(self, model: ModelFiles, files: Files, matrix: Matrix) -> None:
        self.model, self.files, self.matrix = model, files, matrix
        self.g = model.geometry
        self.shift = False

    def find(self, path: str, rows: int, columns: int, experts: int | None = None) -> Weight:
        weight = self.matrix(path, rows, columns, experts) or plain(
            self.files, path, rows, columns, experts
        )
        if weight is None:
            shape = [rows, columns] if experts is None else [experts, rows, columns]
            raise FormatError(
                self.files.checkpoint.path, path, expected=f"a weight of {shape}", found="none"
            )
        return weight

    def weight(self, path: str, rows: int, columns: int) -> None:
        self.model.weights[path] = self.find(path, rows, columns)

    def norm(self, path: str, size: int) -> None:
        w = self.files.numbers(f"{path}.weight", (size,))
        self.model.tensors[path] = w + np.float32(1) if self.shift else w

    def norms_need_one(self, shifted: bool) -> bool:
        """Files with conv1d in HF's [C, 1, k] keep norms zero-centred; with [C, k, 1], as 1 + w."""
        config = self.files.checkpoint.config
        if config.get("jang_norms_pre_shifted") is True:
            return False
        g, answers = self.g, {}
        if g.kernel > 1:
            for i, kind in enumerate(g.layer_types):
                name = f"layers.{i}.linear_attn.conv1d.weight"
                if kind == "linear_attention" and name in self.files:
                    t = self.files.take(name, tuple(FLOATS), (None, None, None))
                    answers.setdefault(t.shape[-1] != 1, name)
        if len(answers) == 2:
            raise FormatError(
                self.files.checkpoint.path, answers[True], expected="one conv1d layout",
                found=f"another in {answers[False]}",
            )  # fmt: skip
        return next(iter(answers), not shifted)

    def attention(self, path: str) -> None:
        g = self.g
        self.weight(f"{path}.q_proj", 2 * g.heads * g.head_dim, g.hidden)  # query and output gate
        self.weight(f"{path}.k_proj", g.kv_heads * g.head_dim, g.hidden)
        self.weight(f"{path}.v_proj", g.kv_heads * g.head_dim, g.hidden)
        self.weight(f"{path}.o_proj", g.hidden, g.heads * g.head_dim)
        self.norm(f"{path}.q_norm", g.head_dim)
        self.norm(f"{path}.k_norm", g.head_dim)

    def delta_net(self, path: str) -> None:
        g, out = self.g, self.model.tensors
        values = g.value_heads * g.value_dim
        self.weight(f"{path}.in_proj_qkv", g.conv_channels, g.hidden)
        self.weight(f"{path}.in_proj_z", values, g.hidden)
        self.weight(f"{path}.in_proj_b", g.value_heads, g.hidden)
        self.weight(f"{path}.in_proj_a", g.value_heads, g.hidden)
        self.weight(f"{path}.out_proj", g.hidden, values)
        c, k = g.conv_channels, g.kernel
        out[f"{path}.conv1d"] = self.files.numbers(
            f"{path}.conv1d.weight", (c, 1, k), (c, k, 1)
        ).reshape(c, k)
        for name in ("A_log", "dt_bias"):
            out[f"{path}.{name}"] = self.files.numbers(f"{path}.{name}", (g.value_heads,))
        out[f"{path}.norm"] = self.files.numbers(f"{path}.norm.weight", (g.value_dim,))

    def moe(self, path: str) -> None:
        g = self.g
        self.weight(f"{path}.gate", g.experts, g.hidden)
        self.weight(f"{path}.shared_expert_gate", 1, g.hidden)
        self.weight(f"{path}.shared_expert.gate_proj", g.shared, g.hidden)
        self.weight(f"{path}.shared_expert.up_proj", g.shared, g.hidden)
        self.weight(f"{path}.shared_expert.down_proj", g.hidden, g.shared)
        experts = f"{path}.experts"
        gate_up = self.experts(experts, "gate_up_proj", 2 * g.moe, g.hidden)
        if gate_up is None:
            halves = [
                self.all_experts(experts, f"{h}_proj", g.moe, g.hidden) for h in ("gate", "up")
            ]
            try:
                gate_up = fuse_rows(halves)
            except ContractError:
                raise UnsupportedError(
                    f"{self.files.checkpoint.path}: {experts}: gate and up under two rotations"
                ) from None
        self.model.weights[f"{experts}.gate_up"] = gate_up
        self.model.weights[f"{experts}.down"] = self.all_experts(
            experts, "down_proj", g.hidden, g.moe
        )

    def all_experts(self, path: str, projection: str, rows: int, columns: int) -> Weight:
        """`experts`, or FormatError."""
        weight = self.experts(path, projection, rows, columns)
        return weight or self.find(f"{path}.{projection}", rows, columns, self.g.experts)

    def experts(self, path: str, projection: str, rows: int, columns: int) -> Weight | None:
        """A projection of all experts, stacked or one by one; None where the files have neither."""
        count = self.g.experts
        stacked = f"{path}.{projection}"
        weight = self.matrix(stacked, rows, columns, count) or plain(
            self.files, stacked, rows, columns, count
        )
        if weight is not None or not self._has(f"{path}.0.{projection}"):
            return weight
        each = (self.find(f"{path}.{e}.{projection}", rows, columns) for e in range(count))
        try:
            return stack_experts(each)
        except ContractError:
            raise UnsupportedError(
                f"{self.files.checkpoint.path}: {path}: experts under two rotations"
            ) from None

    def _has(self, path: str) -> bool:
        leaves = ("weight", "weight_packed", "tq_packed")
        return any(f"{path}.{leaf}" in self.files for leaf in leaves)

    def vision(self, v: Vision) -> None:
        self._affine("visual.patch_embed.proj", None, v)
        self._plain("visual.pos_embed.weight", (v.positions, v.hidden))
        for i in range(v.depth):
            block = f"visual.blocks.{i}"
            for norm in ("norm1", "norm2"):
                self._plain(f"{block}.{norm}.weight", (v.hidden,))
                self._plain(f"{block}.{norm}.bias", (v.hidden,))
            self._affine(f"{block}.attn.qkv", (3 * v.hidden, v.hidden), v)
            self._affine(f"{block}.attn.proj", (v.hidden, v.hidden), v)
            self._affine(f"{block}.mlp.linear_fc1", (v.intermediate, v.hidden), v)
            self._affine(f"{block}.mlp.linear_fc2", (v.hidden, v.intermediate), v)
        merged = v.hidden * v.merge**2
        self._plain("visual.merger.norm.weight", (v.hidden,))
        self._plain("visual.merger.norm.bias", (v.hidden,))
        self._affine("visual.merger.linear_fc1", (merged, merged), v)
        self._affine("visual.merger.linear_fc2", (v.out, merged), v)

    def _plain(self, name: str, shape: tuple[int, ...]) -> None:
        t = self.files.take(name, tuple(FLOATS), shape)
        self.model.vision[name] = Stored(FLOATS[t.dtype], t.array)

    def _affine(self, path: str, shape: tuple[int, int] | None, v: Vision) -> None:
        if shape is None:
            self._patches(f"{path}.weight", v)
        elif (weight := self.matrix(path, *shape, None)) is not None:
            self.model.weights[path] = weight
        else:
            self._plain(f"{path}.weight", shape)
        self._plain(f"{path}.bias", (v.hidden if shape is None else shape[0],))

    def _patches(self, name: str, v: Vision) -> None:
        """HF keeps [out, channels, time, y, x]; MLX and JANGTQ files move channels last."""
        hf = (v.hidden, v.channels, v.temporal, v.patch, v.patch)
        mlx = (v.hidden, v.temporal, v.patch, v.patch, v.channels)
        t = self.files.claim(name)
        if t.dtype not in FLOATS or t.shape not in (hf, mlx):
            raise FormatError(
                t.file, t.name, expected=f"floats of {list(hf)} or {list(mlx)}",
                found=f"{t.dtype} {list(t.shape)}",
            )  # fmt: skip
        last = t.shape == mlx and (hf != mlx or not self.shift)
        array = t.array.transpose(0, 4, 1, 2, 3) if last else t.array
        self.model.vision[name] = Stored(FLOATS[t.dtype], array)

    def mtp(self) -> None:
        for name in self.files.starting("mtp."):
            if _MTP.match(name):
                self.model.mtp.append(self.files.claim(name).name)

    def kv_scales(self) -> None:
        """Scales of a quantised KV cache; only finite ones above 0 count: writers leave garbage."""
        found = [n for n in self.files.starting("layers.") if n.endswith("_scale")]
        for name in found:
            m = _KV_SCALE.match(name)
            if m is None or int(m[1]) >= len(self.g.layer_types):
                continue
            t = self.files.claim(name)
            heads = (self.g.kv_heads, 1, 1)
            if t.dtype not in FLOATS or t.shape not in ((), (1,), heads):
                raise FormatError(
                    t.file, t.name, expected=f"one number or {list(heads)}",
                    found=f"{t.dtype} {list(t.shape)}",
                )  # fmt: skip
            values = as_f32(t).reshape(-1)
            if not (np.isfinite(values) & (values > 0)).all():
                self.model.kv_scales_ignored.append(t.name)
                values = np.ones_like(values)
            self.model.kv_scales[name] = values
