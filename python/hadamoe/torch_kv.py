"""A quantized KV cache inside transformers: its `Cache`, with attention layers that share one
`KVCache` and the stock layers for linear attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from .bf16 import from_bf16
from .errors import ContractError, UnsupportedError
from .kv import PAGE, formats_of, page_bytes
from .kv_cache import KVCache
from .kv_ops import kv_decode
from .torch_cache import GrowingLayer

__all__ = ["KVChoice", "PagedLayer", "PagedStates", "QuantizedCache", "kept", "paged"]

Tensor = torch.Tensor


class KVChoice(NamedTuple):
    """How a model's keys and values are to be kept: the arguments of `KVCache`."""

    layers: int
    heads: int
    head_dim: int
    kv: str | tuple[str, ...]
    window: int | None = None
    tokens: int | None = None
    vectors: Any = None
    scales: Any = None

    @classmethod
    def of(cls, config: Any, kv: str | Sequence[str], **options: Any) -> KVChoice:
        """The choice for a model's config.

        Raises:
            ContractError: an unknown preset, or one that cannot store the model's heads.
        """
        text = config.get_text_config()
        layers = text.layer_types.count("full_attention")
        for codec in {c for f in formats_of(kv, layers) for c in f}:
            page_bytes(codec, text.head_dim)
        kv = kv if isinstance(kv, str) else tuple(kv)
        return cls(layers, text.num_key_value_heads, text.head_dim, kv, **options)

    @property
    def name(self) -> str:
        """The preset, or those of all layers."""
        return self.kv if isinstance(self.kv, str) else ",".join(self.kv)

    def cache(self, dtype: torch.dtype, batch: int = 1, tokens: int | None = None) -> KVCache:
        """An empty cache; ``tokens`` in place of the choice's own."""
        return KVCache(
            self.layers, self.heads, self.head_dim, self.kv, batch=batch,
            dtype=str(dtype).removeprefix("torch."), tokens=tokens or self.tokens,
            window=self.window, vectors=self.vectors, scales=self.scales,
        )  # fmt: skip


class PagedStates(NamedTuple):
    """Keys and values of one attention layer for `DecoderLayer.advance`."""

    cache: KVCache
    ordinal: int


class _Shared:
    """The `KVCache` of all layers, and how long transformers believes it is (with padding)."""

    def __init__(self, choice: KVChoice) -> None:
        self.choice, self.cache = choice, None
        self.length = self.tokens = 0
        self.mask: Tensor | None = None

    def begin(self, batch: int, tokens: int, dtype: torch.dtype, mask: Tensor | None) -> None:
        """Before the first layer of a pass."""
        if self.cache is None:
            self.cache = self.choice.cache(dtype, batch)
        if batch != self.cache.batch:
            raise ContractError(f"kv: the batch is {batch}, needs {self.cache.batch}")
        self.cache.reserve(self._counts(tokens, mask))
        self.tokens = tokens

    def end(self) -> None:
        """After the last layer."""
        self.cache.advance()
        self.length += self.tokens

    def _counts(self, tokens: int, mask: Tensor | None) -> Any:
        """Tokens of each sequence that are no padding, which is never stored."""
        have = torch.from_numpy(self.cache.lengths)
        if mask is None:
            if (have != self.length).any():
                raise ContractError("kv: the sequences have padding, needs their attention_mask")
            return tokens
        if mask.dim() != 4:
            raise ContractError(f"kv: the mask is {list(mask.shape)}, needs [batch, 1, t, keys]")
        seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
        seen = seen.expand(len(have), -1, -1)
        row = torch.arange(tokens)[:, None] + self.length
        column = torch.arange(seen.shape[2])
        padding = self.length + tokens - seen[:, -1].sum(-1)[:, None, None]
        wrong = (seen != ((column >= padding) & (column <= row))) & (row >= padding)
        counts = self.length + tokens - padding.view(-1) - have
        if seen.shape[1:] != (tokens, self.length + tokens) or wrong.any() or (
            (counts < 0) | (counts > tokens) | ((counts < tokens) & (have > 0))
        ).any():  # fmt: skip
            raise ContractError(
                "kv: the mask is not causal with padding in front of each sequence only"
            )
        return counts.numpy()

    def select(self, rows: Any) -> None:
        """Keeps these sequences, in this order."""
        if self.cache is not None:
            self.cache = self.cache.fork(np.asarray(rows))

    def trim(self, n: int) -> None:
        """Forgets the last n tokens, padding included."""
        if self.cache is not None:
            self.cache.trim(np.minimum(self.cache.lengths, n))
            self.length = max(0, self.length - n)

    def reset(self) -> None:
        """Forgets everything."""
        self.cache, self.length = None, 0


class PagedLayer(CacheLayerMixin):
    """One attention layer of a `_Shared`; changes of the batch and crops count once, at the first.

    Native attention reads and writes pages (`attend`). `update` serves transformers' own attention,
    over everything decoded.
    """

    is_compileable, is_croppable, is_sliding, supports_early_init = False, True, False, False

    def __init__(self, shared: _Shared, ordinal: int) -> None:
        super().__init__()
        self.shared, self.ordinal = shared, ordinal

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first pass makes the cache."""

    def _begin(self, batch: int, tokens: int, dtype: torch.dtype, mask: Tensor | None) -> KVCache:
        if self.ordinal == 0:
            self.shared.begin(batch, tokens, dtype, mask)
        return self.shared.cache

    def _end(self) -> None:
        if self.ordinal == self.shared.choice.layers - 1:
            self.shared.end()

    def attend(self, attention: Any, x: Tensor, y: Tensor, angles: Any, mask: Any) -> None:
        """y = x + attention(rmsnorm(x)) of f32 [batch, tokens, hidden], natively."""
        cache = self._begin(x.shape[0], x.shape[1], attention.dtype, mask)
        at = cache.layer(self.ordinal), cache.lengths, cache.reserved
        attention.paged_block(x, y, angles, *at)
        self._end()

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Appends states ``[batch, heads, t, d]``; returns all there are, zeros for padding."""
        states = [a.transpose(1, 2).contiguous() for a in (key_states, value_states)]
        batch, tokens = states[0].shape[:2]
        cache = self._begin(batch, tokens, key_states.dtype, self.shared.mask)
        if cache.window is not None:
            raise UnsupportedError("kv: attention in parts sees every page, a window has not all")
        cache.append(self.ordinal, *states)
        after = cache.lengths + cache.reserved
        width = self.shared.length + tokens
        keys, values = (
            torch.from_numpy(decoded(cache, self.ordinal, side, after, width)).to(key_states.dtype)
            for side in (0, 1)
        )
        self._end()
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens in the cache, padding included."""
        return self.shared.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys a mask has, and the first one's position."""
        return self.shared.length + query_length, 0

    def get_max_length(self) -> int:
        """-1: grows, else the tokens there is room for."""
        return self.shared.choice.tokens or -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens.

        Raises:
            ContractError: they reach back to where tokens are no longer raw.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop: tokens_to_remove={tokens_to_remove}, needs 0 or less")
        if self.ordinal == 0:
            self.shared.trim(-tokens_to_remove)

    def reset(self) -> None:
        """Forgets everything."""
        self.shared.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps these sequences, in this order."""
        if self.ordinal == 0:
            self.shared.select(beam_idx.numpy())


def decoded(cache: KVCache, i: int, side: int, lengths: np.ndarray, width: int) -> np.ndarray:
    """Keys (side 0) or values (1) of layer i, ``lengths`` tokens of each sequence: f32
    ``[batch, heads, width, d]``, zeros in front."""
    layer = cache.layer(i)
    raw = (layer.raw_keys, layer.raw_values)[side]
    pages = (layer.key_pages, layer.value_pages)[side]
    out = np.zeros((cache.batch, cache.heads, width, cache.head_dim), np.float32)
    for s, n in enumerate(lengths):
        rows, full = out[s, :, width - n :], int(n) // PAGE
        ends = ((0, 0), (full, 1 + full % 2)) if full else ((0, 0),)
        for page, slot in ends:
            begin, end = page * PAGE, min(n, (page + 1) * PAGE)
            part = raw[s, :, slot, : end - begin]
            rows[:, begin:end] = from_bf16(part) if part.dtype == np.uint16 else part
        for j in range(cache.heads if full > 1 else 0):
            vectors = None if layer.vectors is None else layer.vectors[2 * side : 2 * side + 2, j]
            scale = 1.0 if layer.scales is None else float(layer.scales[side])
            found = kv_decode(
                pages[layer.table[s, 1:full], j], layer.format[side], cache.head_dim,
                side=("key", "value")[side], vectors=vectors, scale=scale,
            )  # fmt: skip
            rows[j, PAGE : full * PAGE] = found.reshape(-1, cache.head_dim)
    return out


class QuantizedCache(DynamicCache):
    """A cache for ``model(...)`` and ``model.generate(..., past_key_values=...)``.

    Args:
        model: from `hadamoe.load`, or its config.
        kv: a preset of `hadamoe.kv`, or one per attention layer; None: what `load` was given.
        options: window, tokens, vectors, scales of `KVCache`.

    Padding must be in front of each sequence and is not stored. What it holds is ``kv``, a
    `KVCache`, once a pass has begun.
    """

    def __init__(self, model: Any, kv: str | Sequence[str] | None = None, **options: Any) -> None:
        config = getattr(model, "config", model)
        super().__init__(config=config)
        choice = getattr(model, "kv_choice", None)
        if kv is not None:
            options.setdefault("scales", getattr(model, "kv_scales", None))
            choice = KVChoice.of(config, kv, **options)
        elif options and choice is not None:
            choice = choice._replace(**options)
        if choice is None:
            raise ContractError("kv: the model was loaded without kv, needs a preset here")
        _adopt(self, choice)

    @property
    def kv(self) -> KVCache | None:
        """What the attention layers share."""
        return next(x for x in self.layers if isinstance(x, PagedLayer)).shared.cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence."""
        if self.kv is not None:
            self.reorder_cache(torch.arange(self.kv.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the chosen sequences, by number or by truth."""
        if self.kv is not None:
            self.reorder_cache(torch.arange(self.kv.batch)[indices])


def kept(cache: Cache, choice: KVChoice | None) -> tuple[str, int, int]:
    """How a cache that was used keeps keys and values, bytes of a token's, bytes in use."""
    layers = [x for x in cache.layers if isinstance(x, CacheLayerMixin)]
    if choice is not None:
        pages = layers[0].shared.cache
        return choice.name, pages.token_bytes, pages.nbytes
    both = [a for x in layers for a in (x.keys, x.values)]
    nbytes = sum(a.numel() * a.element_size() for a in both)
    return f"{both[0].dtype}"[6:], nbytes // layers[0].get_seq_length(), nbytes


def _adopt(cache: Cache, choice: KVChoice) -> None:
    """Attention layers of an empty cache become pages."""
    shared, ordinal = _Shared(choice), 0
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicLayer):
            cache.layers[i] = PagedLayer(shared, ordinal)
            ordinal += 1
    if ordinal != choice.layers:
        raise ContractError(f"kv: the cache has {ordinal} attention layers, needs {choice.layers}")


def paged(cache: Cache | None, index: int, choice: KVChoice | None) -> PagedLayer | None:
    """The layer of a transformers cache if it is paged; an empty stock one becomes it by choice.

    Raises:
        UnsupportedError: a choice was made, but the layer cannot become one.
    """
    if cache is None or (index >= len(cache.layers) and choice is None):
        return None
    layer = cache.layers[index] if index < len(cache.layers) else None
    stock = type(layer) in (DynamicLayer, GrowingLayer)
    if choice is not None and stock and not layer.get_seq_length():
        _adopt(cache, choice)
        layer = cache.layers[index]
    if isinstance(layer, PagedLayer) or choice is None:
        return layer if isinstance(layer, PagedLayer) else None
    raise UnsupportedError(
        f"kv: a {type(cache).__name__} cannot hold {choice.name}, needs a new DynamicCache made "
        "for the model's config, or hadamoe's QuantizedCache"
    )
