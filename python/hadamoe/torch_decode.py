"""One stream of tokens through the text model as a chain of native calls, transformers left out.

A decoded token is the embedding's row, two calls a layer and one for the head: no module call, no
mask, no array allocated between them. Prompts take the same path in one piece.
"""

from __future__ import annotations

from typing import Any

import torch

from .torch_blocks import DecoderLayer

Tensor = torch.Tensor

#: rope types whose angles depend on the length of the sequence
BY_LENGTH = ("dynamic", "longrope")
_ANGLES = 256  # positions computed together


class Decoder:
    """The state of one sequence: recurrent states, keys and values, position.

    Args:
        model: from `hadamoe.load`.
        capacity: tokens it will ever hold.
    """

    def __init__(self, model: Any, capacity: int) -> None:
        self.text, self.head, self.capacity = text_model(model), model.lm_head, capacity
        self.length = 0
        self.states = [layer.mixer.new_states(1, capacity) for layer in self.text.layers]
        self.angles: tuple[Tensor, Tensor, int] | None = None  # cos, sin, first position

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the model is what `load` built: sdpa attention, no hooks to be called."""
        text = text_model(model)
        return all(isinstance(layer, DecoderLayer) for layer in text.layers) and not any(
            layer.in_parts() or layer._forward_hooks or layer._forward_pre_hooks
            for layer in text.layers
        )

    def _angles(self, tokens: int) -> tuple[Tensor, Tensor]:
        """cos and sin f32 [1, tokens, rotary] of the next positions."""
        rotary, begin = self.text.rotary_emb, self.length
        ahead = tokens if rotary.rope_type in BY_LENGTH else max(tokens, _ANGLES)
        known = self.angles
        if known is None or not known[2] <= begin <= known[2] + known[0].shape[1] - tokens:
            positions = torch.arange(begin, begin + ahead).expand(3, 1, -1)
            known = self.angles = (*rotary(torch.empty(0), positions), begin)
        at = begin - known[2]
        return known[0][:, at : at + tokens], known[1][:, at : at + tokens]

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        """Takes ids int64 [1, t]; returns the last hidden state f32 [1, hidden], not yet normed."""
        x = self.text.embed_tokens(ids)
        angles = self._angles(ids.shape[1])
        for layer, states in zip(self.text.layers, self.states, strict=True):
            layer.advance(x, angles, states, self.length)
        self.length += ids.shape[1]
        return x[:, -1]

    def top(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` largest logits of `feed`'s result f32 and their tokens i32 ``[count]``."""
        values, index = self.head.top(x, count)
        return values[0], index[0]

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """All logits f32 [vocabulary] of `feed`'s result."""
        return self.head(self.text.norm(x))[0]


def text_model(model: Any) -> Any:
    """The text part of a model with or without a vision tower."""
    return getattr(model.model, "language_model", model.model)
