"""config.json, whoever wrote it, as the one dict transformers' Qwen3_5MoeConfig is built from.

Config decides the architecture (how many heads, experts, layers); how a tensor is quantised is
decided by the tensors. Every number the readers use is checked here and kept in `Geometry`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ContractError, FormatError, UnsupportedError

MODEL_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text")
#: Keys about storage, not architecture: no part of the config a model is built from.
_STORAGE = (
    "quantization", "quantization_config", "weight_format", "mxtq_seed", "mxtq_bits",
    "jang_profile",
    "routed_expert_bits", "jang_norms_pre_shifted", "compression_config", "transformers_version",
)  # fmt: skip
_TOP_LEVEL = (
    "architectures", "model_type", "text_config", "vision_config",
    "image_token_id", "video_token_id",
    "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings",
)  # fmt: skip
_ROPE = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
_LIMIT = 1 << 24


@dataclass(frozen=True, slots=True)
class Vision:
    """Sizes of the vision tower."""

    depth: int
    hidden: int
    intermediate: int
    out: int
    positions: int
    channels: int
    patch: int
    temporal: int
    merge: int


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of the text model, in elements, and of the vision tower where config has one."""

    vocab: int
    hidden: int
    layer_types: tuple[str, ...]
    heads: int
    kv_heads: int
    head_dim: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    experts: int
    top_k: int
    moe: int
    shared: int
    eps: float
    tied: bool
    vision: Vision | None

    @property
    def conv_channels(self) -> int:
        """Channels of the delta net's convolution: q, k and v side by side."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


def normalise(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """HF layout (text_config, vision_config), rope settings merged, storage keys dropped.

    Accepts text-only configs, rope_theta / rope_scaling of older transformers at either level, and
    mlx-lm's ``type`` for ``rope_type``. Raises FormatError naming the key, UnsupportedError for
    another model_type.
    """
    out = copy.deepcopy({k: v for k, v in config.items() if k not in _STORAGE})
    kind = out.get("model_type")
    if kind not in MODEL_TYPES:
        raise UnsupportedError(
            f"{path}: model_type {kind!r}; hadamoe runs {' and '.join(MODEL_TYPES)}"
        )
    text = out.get("text_config")
    if text is None:
        text = {
            k: out.pop(k) for k in list(out) if k not in _TOP_LEVEL or k == "tie_word_embeddings"
        }
        out["text_config"] = text
        out.setdefault("tie_word_embeddings", text.get("tie_word_embeddings", False))
    for key in ("text_config", "vision_config"):
        if key in out and out[key] is not None and type(out[key]) is not dict:
            raise _wrong(path, key, "an object", out[key])
    out["model_type"], text["model_type"] = MODEL_TYPES
    for key in _STORAGE:
        text.pop(key, None)
    if "num_experts" not in text and "num_local_experts" in text:
        text["num_experts"] = text["num_local_experts"]
    _merge_rope(out, text, path)
    if text.get("layer_types") is None:
        interval = _integer(text, "full_attention_interval", path, 4)
        layers = _integer(text, "num_hidden_layers", path, most=4096)
        text["layer_types"] = [
            "linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)
        ]
    if text.get("eos_token_id") is None and out.get("eos_token_id") is not None:
        text["eos_token_id"] = out["eos_token_id"]
    return out


def with_rope(config: Mapping[str, Any], override: Mapping[str, Any] | str) -> dict[str, Any]:
    """A copy of a normalised config with rope settings merged in: ``"yarn:4"`` (YaRN over four
    times the context the model was trained for) or e.g.
    ``{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}``.

    theta, the rotary share and the mrope sections stay as they are unless named;
    ``max_position_embeddings`` becomes factor x original.

    Raises:
        ContractError: a string that is not ``yarn:FACTOR``.
        FormatError: a setting that is not a number it can be.
    """
    out = copy.deepcopy(dict(config))
    text = out["text_config"]
    if isinstance(override, str):
        override = _yarn(override, text)
    rope = dict(text["rope_parameters"]) | dict(override)
    rope["rope_type"] = rope.pop("type", None) or rope["rope_type"]
    text["rope_parameters"] = rope
    _check_rope(rope, Path("rope override"))
    if "factor" in rope and "original_max_position_embeddings" in rope:
        reach = int(rope["factor"] * rope["original_max_position_embeddings"])
        text["max_position_embeddings"] = reach
    return out


def _yarn(words: str, text: Mapping[str, Any]) -> dict[str, Any]:
    kind, _, factor = words.partition(":")
    if kind != "yarn" or not re.fullmatch(r"\d{1,3}(\.\d+)?", factor) or float(factor) < 1:
        raise ContractError(f"rope: {words!r}, needs yarn:FACTOR, FACTOR from 1 to 999")
    original = text["rope_parameters"].get("original_max_position_embeddings")
    original = original or _integer(text, "max_position_embeddings", Path("rope override"))
    return {
        "rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": original,
    }  # fmt: skip


def geometry(config: Mapping[str, Any], path: Path) -> Geometry:
    """Checked sizes from a normalised config."""
    text = config["text_config"]

    def size(key: str, most: int = _LIMIT) -> int:
        return _integer(text, key, path, most=most)

    for key, want in (
        ("attention_bias", False), ("attn_output_gate", True), ("norm_topk_prob", True),
        ("hidden_act", "silu"), ("mlp_only_layers", []),
    ):  # fmt: skip
        if text.get(key, want) not in (want, None):
            raise UnsupportedError(f"{path}: {key} {text[key]!r}; hadamoe runs {want!r} only")
    layers = size("num_hidden_layers", 4096)
    kinds = text["layer_types"]
    allowed = ("linear_attention", "full_attention")
    if type(kinds) is not list or len(kinds) != layers or any(k not in allowed for k in kinds):
        raise _wrong(path, "layer_types", f"{layers} of {' or '.join(allowed)}", kinds)
    g = Geometry(
        vocab=size("vocab_size"), hidden=size("hidden_size"), layer_types=tuple(kinds),
        heads=size("num_attention_heads"), kv_heads=size("num_key_value_heads"),
        head_dim=size("head_dim"), key_heads=size("linear_num_key_heads"),
        value_heads=size("linear_num_value_heads"), key_dim=size("linear_key_head_dim"),
        value_dim=size("linear_value_head_dim"), kernel=size("linear_conv_kernel_dim", 64),
        experts=size("num_experts", 65536), top_k=size("num_experts_per_tok", 65536),
        moe=size("moe_intermediate_size"), shared=size("shared_expert_intermediate_size"),
        eps=_number(text, "rms_norm_eps", path), tied=_flag(config, "tie_word_embeddings", path),
        vision=_vision(config, path),
    )  # fmt: skip
    for key, value, divisor in (
        ("num_attention_heads", g.heads, g.kv_heads),
        ("linear_num_value_heads", g.value_heads, g.key_heads),
    ):
        if value % divisor:
            raise _wrong(path, key, f"a multiple of {divisor}", value)
    if g.top_k > g.experts:
        raise _wrong(path, "num_experts_per_tok", f"at most num_experts {g.experts}", g.top_k)
    return g


def _vision(config: Mapping[str, Any], path: Path) -> Vision | None:
    v = config.get("vision_config")
    if v is None:
        return None

    def size(key: str, default: int) -> int:
        return _integer(v, key, path, default)

    return Vision(  # transformers' defaults, where a text-only conversion left half a config
        depth=_integer(v, "depth", path, 27, most=4096), hidden=size("hidden_size", 1152),
        intermediate=size("intermediate_size", 4304), out=size("out_hidden_size", 3584),
        positions=size("num_position_embeddings", 2304), channels=size("in_channels", 3),
        patch=size("patch_size", 16), temporal=size("temporal_patch_size", 2),
        merge=size("spatial_merge_size", 2),
    )  # fmt: skip


def _merge_rope(top: dict[str, Any], text: dict[str, Any], path: Path) -> None:
    rope: dict[str, Any] = {}
    for level in (top, text):
        for key in _ROPE:
            if level.get(key) is not None and key not in rope:
                rope[key] = level[key]
    for level in (text, top):
        for key in ("rope_parameters", "rope_scaling"):
            part = level.pop(key, None)
            if part is None:
                continue
            if type(part) is not dict:
                raise _wrong(path, key, "an object", part)
            part = dict(part)
            if "type" in part:
                part.setdefault("rope_type", part.pop("type"))
            rope |= part
    for key in ("rope_theta", "mrope_section", "mrope_interleaved"):
        top.pop(key, None)
        text.pop(key, None)
    top.pop("partial_rotary_factor", None)
    rope.setdefault("rope_type", "default")
    rope.setdefault("partial_rotary_factor", 0.25)
    _check_rope(rope, path)
    text["rope_parameters"] = rope


def _check_rope(rope: dict[str, Any], path: Path) -> None:
    if type(rope["rope_type"]) is not str:
        raise _wrong(path, "rope_type", "a string", rope["rope_type"])
    theta, share = _number(rope, "rope_theta", path), _number(rope, "partial_rotary_factor", path)
    if rope.get("factor") is not None:
        _number(rope, "factor", path)
    if not share <= 1:
        raise _wrong(path, "partial_rotary_factor", "at most 1", share)
    if not theta > 1:
        raise _wrong(path, "rope_theta", "above 1", theta)
    rope["rope_theta"] = theta
    sections = rope.get("mrope_section")
    if sections is not None and (
        type(sections) is not list or not all(type(s) is int and 0 <= s < _LIMIT for s in sections)
    ):
        raise _wrong(path, "mrope_section", "a list of sizes", sections)


def _integer(
    d: Mapping[str, Any], key: str, path: Path, default: int | None = None, most: int = _LIMIT
) -> int:
    value = d.get(key, default)
    if type(value) is not int or not 1 <= value <= most:
        raise _wrong(path, key, f"an integer from 1 to {most}", value)
    return value


def _number(d: Mapping[str, Any], key: str, path: Path) -> float:
    value = d.get(key)
    if type(value) not in (int, float) or not 0 < value < 1e30:  # type: ignore[operator]
        raise _wrong(path, key, "a number above 0", value)
    return float(value)  # type: ignore[arg-type]


def _flag(d: Mapping[str, Any], key: str, path: Path) -> bool:
    value = d.get(key)
    if value is None:
        return False
    if type(value) is not bool:
        raise _wrong(path, key, "true or false", value)
    return value


def _wrong(path: Path, key: str, expected: str, found: Any) -> FormatError:
    text = "nothing" if found is None else repr(found)
    return FormatError(
        path, key, expected=expected, found=text if len(text) < 80 else text[:77] + "..."
    )
