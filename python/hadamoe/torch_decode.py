"""One stream of tokens through the text model as a chain of native calls, transformers left out.

A decoded token is the embedding's row, two calls a layer and one for the head: no module call, no
mask, no array allocated between them. Prompts take the same path in one piece.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from .errors import ContractError
from .kv import PAGE
from .kv_prefix import EVERY, PrefixCache
from .torch_blocks import DecoderLayer
from .torch_kv import KVChoice, PagedStates

Tensor = torch.Tensor

#: rope types whose angles depend on the length of the sequence
BY_LENGTH = ("dynamic", "longrope")
_ANGLES = 256  # positions computed together


class Mark(NamedTuple):
    """Where a `Decoder` stood: its length and recurrent states."""

    length: int
    states: list[Tensor]


class Decoder:
    """The state of one sequence: recurrent states, keys and values, position.

    Args:
        model: from `hadamoe.load`.
        capacity: tokens it will ever hold.
        kv: how it keeps keys and values, a preset of `hadamoe.kv` or a `KVChoice`; None: as the
            model was loaded.
        prefix: of `prefix_cache`: where `prompt` looks for beginnings and leaves them.

    Attributes:
        cache: the `KVCache`; None where keys and values are contiguous, unquantized.
    """

    def __init__(
        self,
        model: Any,
        capacity: int,
        kv: str | KVChoice | None = None,
        prefix: PrefixCache | None = None,
    ) -> None:
        self.text, self.head, self.capacity = text_model(model), model.lm_head, capacity
        self.length, self.prefix = 0, prefix
        self.ids: list[int] = []  # kept for the prefix cache only
        choice = choice_of(model, kv)
        self.name, self.cache = getattr(choice, "name", ""), None
        if prefix is not None:
            self.cache = prefix.origin.empty()
        elif choice is not None:
            self.cache = choice.cache(_dtype(self.text), tokens=capacity)
        self.states = [
            None if self.cache is not None and not layer.linear
            else layer.mixer.new_states(1, capacity)
            for layer in self.text.layers
        ]  # fmt: skip
        self._page()
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

    def _page(self) -> None:
        """Attention layers of a paged cache find it among the states."""
        if self.cache is not None:
            attention = [i for i, layer in enumerate(self.text.layers) if not layer.linear]
            for ordinal, i in enumerate(attention):
                self.states[i] = PagedStates(self.cache, ordinal)

    def _recurrent(self) -> list[Tensor]:
        """Conv windows and states of the linear layers."""
        pairs = zip(self.text.layers, self.states, strict=True)
        return [state for layer, states in pairs if layer.linear for state in states]

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        """Takes ids int64 [1, t]; returns the last hidden state f32 [1, hidden], not yet normed."""
        while ids.shape[1] > (most := self._most()):
            self._pass(ids[:, :most])
            ids = ids[:, most:]
            if self.prefix is not None and self.length % EVERY == 0:
                self.remember()
        return self._pass(ids)

    def _most(self) -> int:
        """Tokens of one pass: a window's pages are left behind between passes."""
        most = 1 << 62
        if self.prefix is not None:
            most = EVERY - self.length % EVERY
        if self.cache is not None and self.cache.window is not None:
            most = min(most, PAGE * self.cache.window)
        return most

    def _pass(self, ids: Tensor) -> Tensor:
        x = self.text.embed_tokens(ids)
        angles = self._angles(ids.shape[1])
        if self.cache is not None:
            self.cache.reserve(ids.shape[1])
        for layer, states in zip(self.text.layers, self.states, strict=True):
            layer.advance(x, angles, states, self.length)
        if self.cache is not None:
            self.cache.advance()
        self.length += ids.shape[1]
        if self.prefix is not None:
            self.ids += ids[0].tolist()
        return x[:, -1]

    def prompt(self, ids: Tensor) -> Tensor:
        """`feed` of a whole prompt, first of all: begins where a remembered one stood, with the
        same bits, and remembers this one."""
        if self.length:
            raise ContractError(f"prompt: {self.length} tokens were fed before, needs none")
        hit = None if self.prefix is None else self.prefix.find(ids[0].numpy())
        if hit is not None:
            self.cache, self.length = hit.cache, hit.length
            self.ids = ids[0, : hit.length].tolist()
            for state, known in zip(self._recurrent(), hit.states, strict=True):
                state.copy_(torch.from_numpy(known))
            self._page()
        x = self.feed(ids[:, self.length :])
        if self.prefix is not None:
            self.remember()
        return x

    def remember(self) -> None:
        """Leaves a snapshot in the prefix cache, for turns that go on from here."""
        states = [state.numpy() for state in self._recurrent()]
        self.prefix.put(self.cache, np.array(self.ids, np.int64), states)

    def mark(self) -> Mark:
        """What `rewind` needs to come back here."""
        return Mark(self.length, [state.clone() for state in self._recurrent()])

    def rewind(self, mark: Mark) -> None:
        """Forgets all tokens since the mark, such as a draft that was rejected.

        Raises:
            ContractError: they reach back to where tokens are no longer raw (`KVCache.trim`).
        """
        if self.cache is not None:
            self.cache.trim(self.length - mark.length)
        for state, known in zip(self._recurrent(), mark.states, strict=True):
            state.copy_(known)
        self.length = mark.length
        del self.ids[mark.length :]

    def kept(self) -> tuple[str, int, int]:
        """How keys and values are kept, bytes of a token's, bytes in use."""
        if self.cache is not None:
            return self.name, self.cache.token_bytes, self.cache.nbytes
        pairs = zip(self.text.layers, self.states, strict=True)
        both = [a for layer, states in pairs if not layer.linear for a in states]
        token_bytes = sum(a[0, :, 0].nbytes for a in both)
        return f"{both[0].dtype}"[6:], token_bytes, self.length * token_bytes

    def top(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` largest logits of `feed`'s result f32 and their tokens i32 ``[count]``."""
        values, index = self.head.top(x, count)
        return values[0], index[0]

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """All logits f32 [vocabulary] of `feed`'s result."""
        return self.head(self.text.norm(x))[0]


def choice_of(model: Any, kv: str | KVChoice | None) -> KVChoice | None:
    """How a model's cache is to be: kv, or what it was loaded with; None: unquantized."""
    if kv is None:
        return model.kv_choice
    if isinstance(kv, KVChoice):
        return kv
    return None if kv == "bf16" else KVChoice.of(model.config, kv, scales=model.kv_scales)


def prefix_cache(model: Any, budget_bytes: int, kv: str | KVChoice | None = None) -> PrefixCache:
    """A prefix cache for `Decoder`.

    Raises:
        ContractError: the model is unquantized and no kv is given.
    """
    choice = choice_of(model, kv)
    if choice is None:
        raise ContractError("prefix_cache: keys and values are not paged, needs kv")
    dtype = _dtype(text_model(model))
    return PrefixCache(budget_bytes, choice.cache(dtype), model.config.name_or_path)


def _dtype(text: Any) -> torch.dtype:
    return next(layer.self_attn.dtype for layer in text.layers if not layer.linear)


def text_model(model: Any) -> Any:
    """The text part of a model with or without a vision tower."""
    return getattr(model.model, "language_model", model.model)
