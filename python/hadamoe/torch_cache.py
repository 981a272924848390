"""Keys and values of attention in memory that grows by doubling, inside transformers' `Cache`."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

Tensor = torch.Tensor

#: tokens a cache holds room for at first
FIRST = 256


class GrowingLayer(DynamicLayer):
    """transformers' `DynamicLayer` without a copy of everything per token.

    ``keys`` and ``values`` are views ``[batch, heads, length, d]`` of memory that native attention
    writes into at ``length``. Cropping, beam reordering and batch selection work as for the base.
    """

    def __init__(self) -> None:
        self.is_initialized, self.length = False, 0
        self.room: tuple[Tensor, Tensor] | None = None  # [batch, heads, capacity, d] each

    @classmethod
    def of(cls, layer: DynamicLayer) -> GrowingLayer:
        """A layer with the contents of another one."""
        grown = cls()
        if layer.get_seq_length():
            grown.update(layer.keys, layer.values)
        return grown

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes dtype, device and shape from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def reserve(self, shape: tuple[int, int, int], tokens: int, dtype: torch.dtype) -> None:
        """Makes room for ``tokens`` more of (batch, heads, d)."""
        needs = self.length + tokens
        if self.room is not None and self.room[0].shape[2] >= needs:
            return
        batch, heads, d = shape
        capacity = max(FIRST, needs, 2 * self.length)
        room = tuple(torch.empty(batch, heads, capacity, d, dtype=dtype) for _ in range(2))
        if self.length:
            for new, old in zip(room, (self.keys, self.values), strict=True):
                new[:, :, : self.length] = old
        if not self.is_initialized:
            self.lazy_initialization(*room)
        self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Appends states ``[batch, heads, t, d]``; returns all there are."""
        batch, heads, tokens, d = key_states.shape
        self.reserve((batch, heads, d), tokens, key_states.dtype)
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, self.length : self.length + tokens] = states
        self.length += tokens
        return self.keys, self.values

    def _view(self, which: int) -> Tensor | None:
        return None if self.room is None else self.room[which][:, :, : self.length]

    keys = property(lambda self: self._view(0))
    values = property(lambda self: self._view(1))

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: tokens_to_remove={tokens_to_remove}, needs 0 or less")
        self.length = max(0, self.length + tokens_to_remove)

    def _select(self, rows: Tensor) -> None:
        """Keeps these sequences, in this order."""
        if self.room is None:
            return
        room = tuple(r.new_empty((len(rows), *r.shape[1:])) for r in self.room)
        for new, old in zip(room, (self.keys, self.values), strict=True):
            new[:, :, : self.length] = old[rows]
        self.room = room

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders sequences for beam search."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence."""
        if self.room is not None:
            self._select(torch.arange(len(self.room[0])).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the chosen sequences."""
        if self.room is not None:
            self._select(torch.arange(len(self.room[0]))[indices])

    def reset(self) -> None:
        """Forgets everything."""
        self.room, self.length, self.is_initialized = None, 0, False


def claim(
    cache: Cache | None, index: int, shape: tuple[int, int, int], tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, int] | None:
    """(keys, values, past) with room for ``tokens`` more, which count as cached from now on.

    Args:
        shape: (batch, heads, d).

    Returns:
        None where the layer is one native code cannot write into.
    """
    if cache is None:
        batch, heads, d = shape
        keys, values = (torch.empty(batch, heads, tokens, d, dtype=dtype) for _ in range(2))
        return keys, values, 0
    if index < len(cache.layers) and type(cache.layers[index]) is DynamicLayer:
        cache.layers[index] = GrowingLayer.of(cache.layers[index])
    layer = cache.layers[index] if index < len(cache.layers) else None
    if isinstance(layer, GrowingLayer):
        layer.reserve(shape, tokens, dtype)
        past = layer.length
        layer.length += tokens
        return *layer.room, past
    if type(layer) is StaticLayer:
        batch, heads, d = shape
        if not layer.is_initialized:
            states = torch.empty(batch, heads, 0, d, dtype=dtype)
            layer.lazy_initialization(states, states)
        past = int(layer.cumulative_length)
        layer.cumulative_length.add_(tokens)
        return layer.keys, layer.values, past
    return None
