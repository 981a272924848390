"""load(): mlx-lm's model of a checkpoint over our layers, its weights left in the files."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import utils
from mlx_lm.models import qwen3_5, qwen3_5_moe

from . import formats
from .errors import ContractError, UnsupportedError, reading
from .formats import ModelFiles, roles
from .kv import formats_of, page_bytes
from .machine import no_collection
from .mlx_blocks import Attention, DecoderLayer, GatedDeltaNet, SparseMoeBlock
from .mlx_cache import quantized
from .mlx_layers import QEmbedding, QLinear
from .packed import census
from .resident import Progress, make_resident

__all__ = ["Model", "load", "load_model"]

#: settings of YaRN that transformers knows and mlx-lm does not, or takes otherwise
_YARN = ("attention_factor", "truncate", "mscale", "mscale_all_dim")


def load(path: str | PathLike[str], **options: Any) -> tuple[Model, Any]:
    """Opens a checkpoint directory as ``mlx_lm.load`` does; options of `load_model`.

    Returns:
        (model, tokenizer): mlx-lm's ``qwen3_5_moe.Model`` and ``TokenizerWrapper``; the tokenizer
        is None where the directory has none.
    """
    path = Path(path)
    model, config = load_model(path, **options)
    if not model.has_tokenizer:
        return model, None
    with reading(path, "a tokenizer that mlx-lm reads"):
        return model, utils.load_tokenizer(path, eos_token_ids=config.get("eos_token_id"))


def load_model(
    path: str | PathLike[str],
    *,
    dtype: mx.Dtype | str | None = None,
    rope: dict[str, Any] | str | None = None,
    kv: str | Sequence[str] = "bf16",
    vision: bool = False,
    resident: bool = False,
    progress: Progress | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Opens a checkpoint directory as mlx-lm's model; reads no weight until it is used.

    Args:
        path: directory in any of the formats `hadamoe.inspect` knows.
        dtype: of keys and values in mlx-lm's caches, an MLX dtype or its name; None takes the
            config's (bfloat16 where it names none). All else is f32.
        rope: ``"yarn:4"`` for four times the context the model was trained for, or overrides
            merged into the text model's rope parameters.
        kv: how ``model.make_cache()`` keeps keys and values: a preset of `hadamoe.kv`, or one per
            attention layer. "bf16" is mlx-lm's own cache in dtype.
        vision: only False: mlx-lm's model has no vision tower.
        resident: copies the weights into memory now instead of leaving them in their mapped files.
        progress: called with (bytes read, bytes in all) while that happens.

    Returns:
        (model, config), the config as ``mlx_lm.utils.load_config`` gives it.

    Raises:
        FormatError: the files are not what their format promises.
        ContractError: an unknown preset or dtype.
        UnsupportedError: a kernel instance, rope type, codec or part this build has no code for.
        DeviceError: resident weights need more memory than is available.
    """
    if vision:
        raise UnsupportedError("load: vision=True, mlx-lm's qwen3_5_moe has no vision tower")
    with no_collection():
        files = formats.read(path)
        census(files.weights.values())
        values = formats.with_rope(files.config, rope) if rope else files.config
        args = _arguments(values)
        dtype = _dtype(dtype, values)
        names = _codecs(kv, args, values["text_config"]["layer_types"])
        if resident:
            make_resident(files, vision=False, progress=progress)
        model = Model(files, args, dtype, names)
    with reading(Path(path) / "config.json", "a config that mlx-lm reads"):
        return model, utils.load_config(Path(path))


class Model(qwen3_5_moe.Model):
    """mlx-lm's model; its layers, embedding and head read the checkpoint's own bytes.

    Attributes:
        kv: preset of new caches, or one per attention layer with commas between; None: mlx-lm's.
        has_tokenizer: whether the directory has one.
    """

    def __init__(
        self, files: ModelFiles, args: Any, dtype: mx.Dtype, kv: str | None = None
    ) -> None:
        super().__init__(args)
        self.kv, self.has_tokenizer = kv, files.tokenizer
        text, sizes = self.language_model.model, self.language_model.args
        text.embed_tokens = QEmbedding(files.weights["embed_tokens"])
        text.norm.weight = mx.array(files.tensors["norm"].astype(np.float32))
        text.layers = [_layer(files, i, sizes, dtype) for i in range(sizes.num_hidden_layers)]
        # mlx-lm's own numbers are right only where every n-th layer is attention
        linear = [layer.is_linear for layer in text.layers]
        text.ssm_idx = linear.index(True) if True in linear else None
        text.fa_idx = linear.index(False) if False in linear else None
        self.language_model.lm_head = QLinear(files.weights["lm_head"])
        self.eval()

    def make_cache(self) -> list[Any]:
        """One cache per layer, for mlx-lm's generation; as ``load(kv=)`` was told."""
        caches = super().make_cache()
        return caches if self.kv is None else quantized(caches, _names(self.kv))

    def shard(self, group: Any = None) -> None:
        """Not offered.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("shard: the weights are read in place, on one machine")

    def load_weights(self, *_: Any, **__: Any) -> nn.Module:
        """Not offered: adapters and other weights have nowhere to go.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("load_weights: the checkpoint is read in place, with no adapters")

    def save_weights(self, file: str) -> None:
        """Not offered: the weights are no parameters, it would save none.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("save_weights: the checkpoint is read in place; copy its directory")


def _layer(files: ModelFiles, i: int, args: Any, dtype: mx.Dtype) -> DecoderLayer:
    norms = roles.norms(files, i)
    if files.geometry.layer_types[i] == "full_attention":
        weights, vectors = roles.attention(files, i)
        mixer: nn.Module = Attention(args, weights, norms[0], vectors, dtype)
    else:
        weights, vectors = roles.delta_net(files, i)
        mixer = GatedDeltaNet(args, weights, norms[0], vectors)
    return DecoderLayer(mixer, SparseMoeBlock(args, roles.moe(files, i), norms[1]))


def _arguments(values: dict[str, Any]) -> Any:
    """mlx-lm's ``ModelArgs`` of a normalised config."""
    text = copy.deepcopy(values["text_config"])  # mlx-lm writes into it
    rope = text["rope_parameters"]
    kind = rope["rope_type"]
    if kind not in ("default", "yarn"):
        raise UnsupportedError(f"load: rope_type is {kind!r}, on MLX it needs 'default' or 'yarn'")
    odd = [k for k in _YARN if kind == "yarn" and rope.get(k) is not None]
    if odd:
        raise UnsupportedError(f"load: rope parameter {odd[0]} has no meaning to mlx-lm's yarn")
    text["tie_word_embeddings"] = False  # the head is one of ours, tied or not
    return qwen3_5_moe.ModelArgs(model_type=values["model_type"], text_config=text)


def _dtype(dtype: mx.Dtype | str | None, values: dict[str, Any]) -> mx.Dtype:
    names = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
    if dtype is None:
        places = (values, values["text_config"])
        found = [p.get(k) for p in places for k in ("dtype", "torch_dtype") if p.get(k)]
        dtype = found[0] if found else "bfloat16"
    name = str(dtype).removeprefix("mlx.core.")
    if name not in names:
        raise ContractError(f"load: dtype={name}, needs float32, bfloat16 or float16")
    return names[name]


def _names(kv: str) -> str | list[str]:
    names = kv.split(",")
    return names[0] if len(names) == 1 else names


def _codecs(kv: str | Sequence[str], args: Any, kinds: Sequence[str]) -> str | None:
    """`Model.kv` of what `load` was given, checked."""
    found = formats_of(kv, kinds.count("full_attention"))
    head_dim = qwen3_5.TextModelArgs.from_dict(copy.deepcopy(args.text_config)).head_dim
    for codec in {codec for form in found for codec in form}:
        page_bytes(codec, head_dim)
    if all(form.raw for form in found):
        return None
    return kv if isinstance(kv, str) else ",".join(kv)
