"""A `torch_cuda_decode.Batch` inside transformers' `Cache`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from .errors import ContractError, UnsupportedError
from .torch_cuda_decode import Batch, batch_of

__all__ = ["BatchLayer", "Shared", "adopt"]

Tensor = torch.Tensor

#: Tokens of room beyond a prompt, at first.
ROOM = 1024


class Shared:
    """The `Batch` of all layers, and how long transformers believes it is (with padding)."""

    batch: Batch | None = None

    def __init__(self, text: Any, head: Any, choice: Any) -> None:
        self.parts, self.length = (text, head, choice), 0

    def __del__(self) -> None:
        if self.batch is not None:
            self.parts[0].spare = self.batch

    def begin(self, count: int, tokens: int) -> Batch:
        """The batch of ``count`` sequences, made for a prompt of ``tokens``."""
        if self.batch is None:
            text, head, choice = self.parts
            self.batch = batch_of(text, head, count, tokens + ROOM, choice)
        if count != len(self.batch.lengths):
            raise ContractError(f"the batch is {count}, the cache has {len(self.batch.lengths)}")
        return self.batch

    def new_tokens(self, mask: Tensor | None, count: int, tokens: int) -> list[int]:
        """Tokens of each sequence that are no padding, which is never stored.

        Raises:
            UnsupportedError: a mask that is not ``[batch, tokens]``.
            ContractError: padding that is not in front of a sequence.
        """
        have = [0] * count if self.batch is None else self.batch.lengths
        if mask is None:
            if any(n != self.length for n in have):
                raise ContractError("the sequences have padding, needs their attention_mask")
            return [tokens] * count
        if isinstance(mask, dict) or mask.dim() != 2:
            raise UnsupportedError("device='cuda' takes an attention_mask of [batch, tokens] only")
        if tuple(mask.shape) != (count, self.length + tokens):
            raise ContractError(
                f"attention_mask is {list(mask.shape)}, needs {[count, self.length + tokens]}"
            )
        seen = mask[:, self.length :].bool().cpu()
        counts = seen.sum(1)
        inside = torch.arange(tokens)[None] >= tokens - counts[:, None]
        for n, past in zip(counts.tolist(), have, strict=True):
            if past and n < tokens:
                raise ContractError("attention_mask: padding is not in front of its sequence")
        if not torch.equal(seen, inside):
            raise ContractError("attention_mask: padding is not in front of its sequence")
        return counts.tolist()


class BatchLayer(CacheLayerMixin):
    """One layer of a `Shared`; what concerns all layers is done at the first."""

    is_compileable, is_croppable, is_sliding, supports_early_init = False, False, False, False

    def __init__(self, shared: Shared, first: bool) -> None:
        super().__init__()
        self.shared, self.first = shared, first

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first pass makes the batch."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Raises: keys and values are written by kernels."""
        raise UnsupportedError("device='cuda': keys and values are written by our kernels only")

    def get_seq_length(self) -> int:
        """Tokens in the cache, padding included."""
        return self.shared.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys a mask has, and the first one's position."""
        return self.shared.length + query_length, 0

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Raises where there is anything to forget: recurrent states cannot be cut."""
        if tokens_to_remove:
            raise UnsupportedError(
                "crop: the states of linear attention cannot be cut; torch_cuda_decode.Decoder "
                "has mark() and rewind()"
            )

    def reset(self) -> None:
        """Forgets everything; memory and graph stay."""
        if self.first and self.shared.batch is not None:
            self.shared.batch.reset()
        self.shared.length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps these sequences, in this order."""
        if self.first and self.shared.batch is not None:
            self.shared.batch.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the chosen sequences, by number or by truth."""
        if self.shared.batch is not None:
            self.reorder_cache(torch.arange(len(self.shared.batch.lengths))[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence."""
        if self.shared.batch is not None:
            rows = torch.arange(len(self.shared.batch.lengths))
            self.reorder_cache(rows.repeat_interleave(repeats))


def adopt(cache: Cache | None, parts: Sequence[Any], layers: int) -> Shared:
    """What a transformers cache shares; an empty stock one becomes ours; None: a new one.

    Args:
        parts: arguments of `Shared`.

    Raises:
        UnsupportedError: it cannot become one.
    """
    if cache is None:
        return Shared(*parts)
    if cache.layers and isinstance(cache.layers[0], BatchLayer):
        return cache.layers[0].shared
    if type(cache) is not DynamicCache or any(
        layer.is_initialized for layer in cache.layers if hasattr(layer, "is_initialized")
        and isinstance(layer.is_initialized, bool)
    ):  # fmt: skip
        raise UnsupportedError(
            f"device='cuda': a {type(cache).__name__} cannot hold our states, needs none or a new "
            "DynamicCache"
        )
    shared = Shared(*parts)
    cache.layers = [BatchLayer(shared, i == 0) for i in range(layers)]
    return shared
