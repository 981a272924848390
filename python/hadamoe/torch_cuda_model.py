"""transformers' models over layers on CUDA, and how their weights get there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as hf

from . import torch_cuda, torch_gpu
from .cuda_kv import HEAD_DIMS
from .errors import DeviceError, UnsupportedError
from .formats import ModelFiles
from .packed import pack
from .resident import Progress
from .torch_blocks import zero_centred
from .torch_cuda_blocks import Embedding, Head, Place, layers, place
from .torch_cuda_cache import adopt
from .torch_cuda_decode import Batch, choice_of
from .torch_decode import BY_LENGTH, text_model
from .torch_layers import Fused

Tensor = torch.Tensor

_RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits")


class TextModel(hf.Qwen3_5MoeTextModel):
    """transformers' text model; its layers are ours and know the tokens of all sequences at once.

    Attributes:
        outer: the causal model, in a list: it is no part of this one.
        spare: sequences that nobody holds any more, for the next ones (`batch_of`).
    """

    outer: list[Any]
    spare: Batch | None

    def parts(self) -> tuple[Any, Any, Any]:
        """What a `Shared` is made of."""
        (model,) = self.outer
        return self, model.lm_head, choice_of(model, None)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> MoeModelOutputWithPast:
        """Hidden states f32 ``[batch, tokens, hidden]``, those of padding zeros; arguments as
        transformers' own.

        Raises:
            UnsupportedError: what passes between layers is asked for.
        """
        for name in _RECORDED:
            if options.get(name):
                raise UnsupportedError(f"device='cuda': {name} is not there")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds.float()
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        shared = adopt(past_key_values, self.parts(), len(self.layers))
        count, tokens = x.shape[:2]
        counts = shared.new_tokens(attention_mask, count, tokens)
        batch = shared.begin(count, tokens)
        keep = torch.arange(tokens)[None] >= tokens - torch.tensor(counts)[:, None]
        keep = keep.to(x.device)
        positions = _positions(position_ids, keep, batch.lengths)
        hidden = batch.prompt(x[keep], positions, counts)
        shared.length += tokens
        y = torch.zeros_like(x)
        y[keep] = self.norm(hidden)
        return MoeModelOutputWithPast(last_hidden_state=y, past_key_values=past_key_values)


def _positions(given: Tensor | None, keep: Tensor, lengths: Sequence[int]) -> Tensor:
    """i64 ``[3, n]`` of the kept tokens, of positions as transformers hands them over."""
    if given is None:
        past = torch.tensor(lengths, device=keep.device)
        given = keep.cumsum(1) - 1 + past[:, None]
    if given.dim() == 2:
        given = given[None]
    given = given[-3:].expand(3, len(keep), -1)
    return given[:, keep]


def _decoding(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """A causal model's forward that decodes a token by replaying a graph."""

    @wraps(theirs)  # transformers reads what it takes off its signature
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        *args: Any,
        past_key_values: Cache | None = None,
        **options: Any,
    ) -> Any:
        """transformers' own, but for one token of every sequence over a cache that has some: its
        position is the next one, it sees all that is not padding."""
        text = text_model(self)
        if not args and past_key_values is not None and past_key_values.get_seq_length():
            shared = adopt(past_key_values, text.parts(), len(text.layers))
            one = input_ids is not None and input_ids.shape[1] == 1
            if one and min(shared.batch.lengths) and _plain(options):
                logits = shared.begin(len(input_ids), 1).step(input_ids[:, 0]).clone()
                shared.length += 1
                return MoeCausalLMOutputWithPast(
                    logits=logits[:, None], past_key_values=past_key_values
                )
        return theirs(self, input_ids, *args, past_key_values=past_key_values, **options)

    return forward


#: What a step does not look at.
_IGNORED = {
    "attention_mask", "position_ids", "use_cache", "return_dict", "logits_to_keep",
    "cache_position", "mm_token_type_ids",
}  # fmt: skip


def _plain(options: dict[str, Any]) -> bool:
    return not any(value for name, value in options.items() if name not in _IGNORED)


class Qwen3_5MoeForCausalLM(hf.Qwen3_5MoeForCausalLM):
    """transformers' model over `TextModel`."""

    forward = _decoding(hf.Qwen3_5MoeForCausalLM.forward)


class Qwen3_5MoeForConditionalGeneration(hf.Qwen3_5MoeForConditionalGeneration):
    """transformers' model over `TextModel`."""

    forward = _decoding(hf.Qwen3_5MoeForConditionalGeneration.forward)


def fill_text(outer: Any, files: ModelFiles, dtype: torch.dtype) -> None:
    """Our layers, embedding and head in the model's places.

    Raises:
        UnsupportedError: heads of a size without kernels, positions that turn by the length of a
            sequence.
    """
    text, w = text_model(outer), files.weights
    config = text.config
    if config.head_dim not in HEAD_DIMS:
        have = ", ".join(map(str, HEAD_DIMS))
        raise UnsupportedError(f"load: head_dim is {config.head_dim}, on CUDA {have}")
    rope = config.rope_parameters["rope_type"]
    if rope in BY_LENGTH:
        raise UnsupportedError(f"load: rope_type {rope!r} is not there for device='cuda'")
    text.__class__, text.outer, text.spare = TextModel, [outer], None
    embedded, head = w["embed_tokens"], w["lm_head"]
    packed = pack(embedded)
    text.embed_tokens = Embedding(packed, dtype)
    text.norm.weight = zero_centred(files.tensors["norm"])
    text.rotary_emb = type(text.rotary_emb)(config)  # its frequencies must not stay on meta
    text.layers = layers(files, config, dtype)
    norm = files.tensors["norm"].astype(np.float32)
    packed = packed if head is embedded else pack(head)  # a tied head is the same object
    outer.lm_head = Head(packed, norm, config.rms_norm_eps)


def upload(model: nn.Module, device: torch.device, progress: Progress | None) -> nn.Module:
    """Moves a model to the GPU, its weights too: while one is on its way the next is packed.

    Raises:
        DeviceError: less memory is free than the weights need.
    """
    places = _places(model)
    vectors = [*model.parameters(), *model.buffers()]
    need = sum(p.nbytes for p in places) + sum(v.numel() * v.element_size() for v in vectors)
    free = torch_cuda.machine.free_bytes(device)
    if need > free:
        raise DeviceError(
            f"load: the weights need {need / 1e9:.2f} GB of GPU memory ({need} bytes), "
            f"{free / 1e9:.2f} GB ({free} bytes) are free"
        )
    model.to(device)
    front, done, total = torch_cuda.front(device), 0, sum(p.nbytes for p in places)
    with ThreadPoolExecutor(2) as pool:
        for p, _ in zip(places, pool.map(lambda p: p.make(front), places), strict=True):
            done += p.nbytes
            if progress is not None:
                progress(done, total)
    return model


def _places(model: nn.Module) -> list[Place]:
    """All weights of a model, in the order of its layers, each once."""
    found: list[Place] = []
    for module in model.modules():
        if isinstance(module, Fused):  # of the vision tower
            found.append(place(torch_gpu.packed(module.parts, module.buffers_, module.columns)))
        elif hasattr(module, "places") and not hasattr(module, "mlp"):
            found += module.places()
    return list({p.weights: p for p in found}.values())
