"""load(): the transformers model of a checkpoint over our layers, its weights left in the files."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, Qwen3_5MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as hf

from . import formats, torch_cuda, torch_cuda_model
from .errors import ContractError, DeviceError, FormatError, UnsupportedError, reading
from .formats import ModelFiles, roles
from .machine import no_collection
from .packed import census
from .resident import Progress, make_resident
from .torch_blocks import (
    Attention,
    DecoderLayer,
    GatedDeltaNet,
    SparseMoeBlock,
    zero_centred,
)
from .torch_kv import KVChoice
from .torch_layers import Head, QEmbedding, QLinear
from .weight import Weight


def load(
    path: str | PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    rope: dict[str, Any] | str | None = None,
    kv: str | Sequence[str] = "bf16",
    vision: bool = True,
    resident: bool = False,
    progress: Progress | None = None,
) -> tuple[nn.Module, Any]:
    """Opens a checkpoint directory as a transformers model; reads no weight until it is used.

    Args:
        path: directory in any of the formats `hadamoe.inspect` knows.
        dtype: of attention, its cache and the vision tower; None takes the config's (bfloat16 where
            it names none). All else is f32 between layers and in every sum.
        device: "cpu"; "cuda" for an NVIDIA GPU: weights are copied there now; or "mps" for a Mac's:
            they are when first used.
        rope: ``"yarn:4"`` for four times the context the model was trained for, or overrides
            merged into the text model's rope parameters, such as
            ``{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}``.
        kv: how caches made for the model keep keys and values: a preset of `hadamoe.kv`, or one
            per attention layer. "bf16" is the contiguous, unquantized cache in dtype, on an NVIDIA
            GPU pages of bf16. "fp8" takes the checkpoint's own scales where it has usable ones.
        vision: False leaves the vision tower out.
        resident: copies the weights into memory now instead of leaving them in their mapped files.
        progress: called with (bytes read, bytes in all) while that happens, or while weights go to
            an NVIDIA GPU.

    Returns:
        (model, tokenizer): `Qwen3_5MoeForConditionalGeneration` where the files hold a vision
        tower, else `Qwen3_5MoeForCausalLM`; the tokenizer is None where the directory has none.

    Raises:
        FormatError: the files are not what their format promises.
        UnsupportedError: a device, framework or kernel instance this build has no code for.
        DeviceError: weights need more memory than is available, no such device, or what it needs
            was not built.
    """
    device = check_device(device, kv)
    if on_cuda := device.type == "cuda":
        device = torch_cuda.machine.device(device)
    with no_collection():
        files = formats.read(path)
        plain = (_plain(t) for t in files.vision.values() if t.array.ndim == 2)
        census((*files.weights.values(), *plain))
        values = formats.with_rope(files.config, rope) if rope else files.config
        config = _config(Path(path), values)
        dtype = _dtype(dtype, config)
        choice = _kv_choice(files, config, kv, on_cuda)
        vision = vision and bool(files.vision)
        if resident:
            make_resident(files, vision=vision, progress=progress)
        model = _build(Path(path), files, config, dtype, vision, choice, on_cuda)
        model.kv_choice, model.kv_scales = choice, _kv_scales(files, config)
        move = torch_cuda_model.upload if on_cuda else lambda model, device, _: model.to(device)
        tokenizer = _tokenizer(Path(path)) if files.tokenizer else None
        return move(model, device, progress), tokenizer


def _build(
    path: Path, files: ModelFiles, config: Qwen3_5MoeConfig, dtype: torch.dtype, vision: bool,
    choice: KVChoice | None, on_cuda: bool,
) -> nn.Module:  # fmt: skip
    kinds = torch_cuda_model if on_cuda else hf
    with torch.device("meta"):
        if vision:
            model = kinds.Qwen3_5MoeForConditionalGeneration(config)
        else:
            model = kinds.Qwen3_5MoeForCausalLM(config.get_text_config())
    if vision:
        _fill_vision(model.model.visual, files, dtype)
        model.model.register_forward_pre_hook(_forget_positions, with_kwargs=True)
    if on_cuda:
        torch_cuda_model.fill_text(model, files, dtype)
    else:
        _fill_text(model.model.language_model if vision else model.model, files, dtype, choice)
        norm = files.tensors["norm"].astype(np.float32)
        model.lm_head = Head(files.weights["lm_head"], norm, config.get_text_config().rms_norm_eps)
    _finish(model, path, dtype)
    return model


def _forget_positions(model: nn.Module, args: tuple, options: dict[str, Any]) -> None:
    """A new prompt must not inherit the position offsets transformers keeps of the last one's
    images: of another batch size they end in an error, of another image in wrong positions."""
    past = options.get("past_key_values")
    fresh = past is None or past.get_seq_length() == 0
    if fresh and options.get("position_ids") is None:
        model.rope_deltas = None


def _kv_scales(files: ModelFiles, config: Qwen3_5MoeConfig) -> np.ndarray | None:
    """f32 [attention layers, 2] for keys and values in fp8; None where a checkpoint has none. Of
    scales per head the largest: whatever any head's own scale can hold, it can."""
    if not files.kv_scales:
        return None
    kinds = config.get_text_config().layer_types
    layers = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    scales = np.ones((len(layers), 2), np.float32)
    for name, values in files.kv_scales.items():
        index, side = int(name.split(".")[1]), name.rsplit(".", 1)[1]
        sides = {"k_scale": [0], "v_scale": [1], "kv_scale": [0, 1]}.get(side, [])
        if index in layers:
            scales[layers.index(index), sides] = values.max()
    return scales


def _kv_choice(
    files: ModelFiles, config: Qwen3_5MoeConfig, kv: str | Sequence[str], on_cuda: bool
) -> KVChoice | None:
    if kv == "bf16" and not on_cuda:  # contiguous there
        return None
    return KVChoice.of(config, kv, scales=_kv_scales(files, config))


def _config(path: Path, values: dict[str, Any]) -> Qwen3_5MoeConfig:
    rope = values["text_config"]["rope_parameters"]
    kinds = ("default", *ROPE_INIT_FUNCTIONS)
    if rope["rope_type"] not in kinds:
        found = repr(rope["rope_type"])
        raise FormatError(
            path / "config.json", "rope_type", expected=" or ".join(kinds), found=found
        )
    with reading(path / "config.json", "a config that transformers accepts"):
        return Qwen3_5MoeConfig(**values)


def _tokenizer(path: Path) -> Any:
    with reading(path, "a tokenizer that transformers reads"):
        return AutoTokenizer.from_pretrained(path)


_FETCHING = (
    "trust_remote_code", "local_files_only", "low_cpu_mem_usage", "use_safetensors", "revision",
    "code_revision", "token", "cache_dir", "force_download", "_from_pipeline", "_commit_hash",
)  # fmt: skip


def from_pretrained(
    path: str | PathLike[str], vision: bool, *args: Any, **options: Any
) -> nn.Module:
    """What transformers' auto classes call for our directories: `load` with their option names."""
    rope = options.pop("rope_scaling", None) or options.pop("rope_parameters", None)
    attention = options.pop("attn_implementation", None)
    dtype = options.pop("dtype", None) or options.pop("torch_dtype", None)
    kv = options.pop("kv", "bf16")
    device = options.pop("device_map", None)
    if isinstance(device, dict) and len(device) == 1:
        device = next(iter(device.values()))
    device = "cpu" if device in (None, "auto") else device
    config = options.pop("config", None)
    if config is not None and config.to_dict() != AutoConfig.from_pretrained(path).to_dict():
        raise UnsupportedError("from_pretrained: config differs from the checkpoint's own")
    # Where and how to fetch: nothing to do for a directory that is read in place.
    for name in _FETCHING:
        options.pop(name, None)
    if args or options:
        names = ", ".join([*map(repr, args), *options])
        raise UnsupportedError(f"from_pretrained: {names} has no meaning for a hadamoe checkpoint")
    model, _ = load(path, dtype=dtype, device=device, rope=rope, kv=kv, vision=vision)
    if attention is not None:
        model.set_attn_implementation(attention)
    return model


def check_device(device: str | torch.device, kv: str | Sequence[str] = "bf16") -> torch.device:
    """The device, if load() has code for it here."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ContractError(f"load: device={device!r}, needs 'cpu', 'cuda' or 'mps'") from None
    if found.type not in ("cpu", "cuda", "mps"):
        raise UnsupportedError(
            f"load: device={str(device)!r} has no kernels, needs 'cpu', 'cuda' or 'mps'"
        )
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("load: device='mps' is not there: it is a Mac's GPU")
    if found.type == "mps" and kv != "bf16":
        raise UnsupportedError(f"load: kv={kv!r} has no kernels for device='mps', needs 'bf16'")
    return found


def _dtype(dtype: torch.dtype | str | None, config) -> torch.dtype:
    if dtype in (None, "auto"):
        dtype = config.dtype or config.get_text_config().dtype or torch.bfloat16
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ContractError(f"load: dtype={dtype}, needs float32, bfloat16 or float16")
    return dtype


def _param(array: np.ndarray, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(
        torch.from_numpy(np.ascontiguousarray(array)).to(dtype), requires_grad=False
    )


def _fill_text(
    text: nn.Module, files: ModelFiles, dtype: torch.dtype, choice: KVChoice | None
) -> None:
    w, config = files.weights, text.config
    text.embed_tokens = QEmbedding(w["embed_tokens"], dtype)
    text.norm.weight = zero_centred(files.tensors["norm"])
    text.rotary_emb = type(text.rotary_emb)(config)  # its frequencies must not stay on meta
    for i, kind in enumerate(config.layer_types):
        norms = roles.norms(files, i)
        if kind == "full_attention":
            weights, vectors = roles.attention(files, i)
            mixer = Attention(config, i, weights, {"norm": norms[0], **vectors}, dtype)
            mixer.kv_choice = choice
        else:
            weights, vectors = roles.delta_net(files, i)
            mixer = GatedDeltaNet(config, i, weights, norms[0], vectors)
        top_k, eps = config.num_experts_per_tok, config.rms_norm_eps
        moe = SparseMoeBlock(roles.moe(files, i), top_k, norms[1], eps)
        text.layers[i] = DecoderLayer(config, i, mixer, moe, norms)


def _fill_vision(visual: nn.Module, files: ModelFiles, dtype: torch.dtype) -> None:
    """Linears stay in the files like the text model's; the few norms and tables are copied."""
    for name, module in list(visual.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            weight = files.weights.get(f"visual.{name}")
            if weight is None:
                weight = _plain(files.vision[f"visual.{name}.weight"])
            bias = files.vision[f"visual.{name}.bias"].f32()
            setattr(visual.get_submodule(parent), leaf, QLinear(weight, bias=bias))
    for name, _ in list(visual.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        value = files.vision[f"visual.{name}"].f32()
        setattr(visual.get_submodule(parent), leaf, _param(value, dtype))
    visual.rotary_pos_emb = type(visual.rotary_pos_emb)(visual.config)


def _plain(stored: formats.Stored) -> Weight:
    """A matrix of stored numbers as a weight: views of the same bytes."""
    instance = ("plain", 32 if stored.dtype == "f32" else 16, stored.dtype)
    return Weight.of(instance, stored.array.shape[1], stored.array)


def _finish(model: nn.Module, path: Path, dtype: torch.dtype) -> None:
    meta = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if meta:
        raise AssertionError(
            f"load: {len(meta)} tensors were given no values: {', '.join(meta[:5])}"
        )
    model.config.dtype = dtype
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    model.save_pretrained = _refuse_to_save  # the weights are not parameters: it would save none
    model.requires_grad_(False).eval()


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise UnsupportedError("save_pretrained: the checkpoint is read in place; copy its directory")
