"""Decoding of mlx-lm's models under `mx.compile`, over a quantized cache whose shapes never change.

    model(prompt, cache=cache)  # of hadamoe.mlx_cache.make_prompt_cache
    step = CompiledStep(model, cache, room=1024)
    logits = step(tokens)       # [b, 1] -> [b, 1, vocabulary], again and again

mlx-lm's caches and those of `hadamoe.mlx_cache` grow and count in Python, so a function compiled
over them is traced anew for each token. Here shapes stay, the count is an array: one trace serves
all tokens. In return each call decodes all the room there is and stores the open page again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models import cache as mlx_lm_cache

from . import mlx_gpu, mlx_gpu_kv
from .errors import ContractError, UnsupportedError
from .kv import PAGE, KVFormat
from .mlx_cache import HadamoeKVCache
from .mlx_kv import kv_decode, kv_encode
from .mlx_pages import slot

__all__ = ["CompiledStep", "HadamoeStaticKVCache"]


class HadamoeStaticKVCache(mlx_lm_cache._BaseCache):
    """What a `HadamoeKVCache` holds, with room for a fixed number of tokens, one more a call.

    Attributes:
        format: codecs of keys and values.
        offset: i32 ``[]``, tokens stored.
        raw: keys and values, ``[2, b, g, 3 * 64, d]``: page 0, then page p from row 64 (1 + p % 2).
        pages: of keys and of values, u8 ``[b, g, m, bytes]``; only full pages but page 0 count.

    Args:
        cache: not empty; it is left as it is.
        tokens: room, rounded up to whole pages.
    """

    def __init__(self, cache: HadamoeKVCache, tokens: int) -> None:
        self.format, self.offset, most = cache.format, mx.array(cache.offset), -(-tokens // PAGE)
        self.raw = mx.stack([side.slots(cache.kept) for side in cache.sides])
        self.pages: list[mx.array] = []
        for side in cache.sides:
            b, g, p, width = side.pages.shape
            before, after = (mx.zeros((b, g, n, width), mx.uint8) for n in (1, most - 1 - p))
            self.pages.append(mx.concatenate([before, side.pages, after], 2))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Stores a token ``[b, g, 1, d]``; returns the whole room ``[b, g, 64 m, d]`` each.

        Raises:
            UnsupportedError: more than one token.
        """
        b, g, t, _ = keys.shape
        if t != 1:
            raise UnsupportedError(f"kv: {t} tokens at once, a static cache takes 1")
        page, newest = self._store(mx.stack([keys, values]))
        given = []
        for i, (codec, side, x) in enumerate(
            zip(self.format, ("key", "value"), (keys, values), strict=True)
        ):
            d = x.shape[-1]
            rows = kv_decode(self.pages[i], codec, d, side=side, dtype=x.dtype)
            rows = rows.reshape(b, g, -1, d)
            rows = mx.concatenate([self.raw[i, :, :, :PAGE], rows[:, :, PAGE:]], 2)
            given.append(mx.slice_update(rows, newest[i], page * PAGE, (2,)))
        return given[0], given[1]

    def _store(self, token: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values ``[2, b, g, 1, d]`` to the raw rows, their page, full or not, to the
        pages; the page's number and rows ``[2, b, g, 64, d]``."""
        page = self.offset // PAGE
        row = mx.where(page == 0, 0, slot(page))
        self.raw = mx.slice_update(self.raw, token, row + self.offset % PAGE, (3,))
        shape = (*self.raw.shape[:3], PAGE, self.raw.shape[4])
        newest = mx.slice(self.raw, row, (3,), shape)
        for i, (codec, side) in enumerate(zip(self.format, ("key", "value"), strict=True)):
            coded = kv_encode(newest[i], codec, side=side)[:, :, None]
            self.pages[i] = mx.slice_update(self.pages[i], coded, page, (2,))
        self.offset = self.offset + 1
        return page, newest

    @property
    def attends(self) -> bool:
        """Whether `attend` can be used."""
        return mlx_gpu.available()

    def attend(self, tokens: mlx_gpu_kv.Prepared, gate: mx.array | None = None) -> mx.array:
        """As `HadamoeKVCache.attend`."""
        self._store(tokens.kv.astype(self.raw.dtype))
        sizes = {"skip": 0, "gate": gate}
        return mlx_gpu_kv.attend(tokens, self.raw, self.pages, self.offset, self.format, **sizes)

    def make_mask(self, n: int, **_: Any) -> mx.array:
        """The keys that the coming token sees: bool ``[n, 64 m]``."""
        return mx.broadcast_to(mx.arange(self.room) <= self.offset, (n, self.room))

    @property
    def room(self) -> int:
        """Tokens there are places for."""
        return self.pages[0].shape[2] * PAGE

    @property
    def state(self) -> tuple:
        """All it holds, as mlx-lm's caches show it."""
        return (*self.format, self.offset, self.raw, self.pages)

    @state.setter
    def state(self, v: Sequence[Any]) -> None:
        key, value, self.offset, raw, pages = v
        self.format, self.raw, self.pages = KVFormat(key, value), raw, list(pages)

    def empty(self) -> bool:
        """False."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes of the whole room."""
        return sum(a.nbytes for a in (self.raw, *self.pages))


class CompiledStep:
    """A model's next token as one compiled function, traced once.

    Args:
        model: a model of mlx-lm.
        cache: of `hadamoe.mlx_cache.make_prompt_cache`, with a prompt in it; left as it is.
        room: tokens that can still come.

    Raises:
        ContractError: an empty cache.
        UnsupportedError: a layer's cache grows, as mlx-lm's own of attention does.
    """

    def __init__(self, model: Any, cache: Sequence[Any], room: int) -> None:
        self._left = room
        caches = []
        for i, c in enumerate(cache):
            if not isinstance(c, HadamoeKVCache | mlx_lm_cache.ArraysCache):
                raise UnsupportedError(f"CompiledStep: layer {i} has a {type(c).__name__}")
            if c.empty():
                raise ContractError(
                    f"CompiledStep: the cache of layer {i} is empty, needs a prompt"
                )
            paged = isinstance(c, HadamoeKVCache)
            caches.append(HadamoeStaticKVCache(c, c.offset + room) if paged else c)
        # new lists: mlx-lm's state is the cache's own
        self._state = tree_map(lambda x: x, [c.state for c in caches])
        classes = [type(c) for c in caches]

        def step(tokens: mx.array, state: Any) -> tuple[mx.array, Any]:
            caches = [c.from_state(s) for c, s in zip(classes, state, strict=True)]
            return model(tokens, cache=caches), [c.state for c in caches]

        self._step = mx.compile(step)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Logits ``[b, 1, vocabulary]`` after tokens ``[b, 1]``.

        Raises:
            ContractError: no room is left.
        """
        if self._left == 0:
            raise ContractError("CompiledStep: no room is left for a token")
        self._left -= 1
        logits, self._state = self._step(tokens, self._state)
        return logits
