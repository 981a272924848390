"""Quantized prompt caches for mlx-lm, on any device of MLX.

    from hadamoe.mlx_cache import make_prompt_cache
    cache = make_prompt_cache(model, "hk4v3")
    mlx_lm.generate(model, tokenizer, prompt, prompt_cache=cache)

mlx-lm's attention takes keys and values as arrays, so this cache hands them over decoded: what that
saves is the memory between calls, not time. A call decodes all pages of a layer, whose rows are
there while the layer runs. On a GPU our own models' attention (`hadamoe.mlx_blocks`) reads
the codes themselves when a token comes alone: `HadamoeKVCache.attend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.base import create_causal_mask

from . import mlx_gpu, mlx_gpu_kv
from .errors import ContractError, UnsupportedError
from .kv import PAGE, KVFormat, formats_of
from .mlx_pages import Joint, Side, slot

__all__ = ["HadamoeBatchKVCache", "HadamoeKVCache", "make_prompt_cache"]


def make_prompt_cache(model: Any, kv: str | Sequence[str] = "hk4v3") -> list[Any]:
    """A model's prompt cache as mlx-lm's `make_prompt_cache` gives it, attention layers quantized.

    Args:
        model: a model of mlx-lm.
        kv: a preset of `hadamoe.kv.PRESETS` or ``"KEY/VALUE"`` of two codecs; or one of these per
            attention layer. "bf16" leaves mlx-lm's own cache.

    Returns:
        One cache per layer: `HadamoeKVCache` for attention, mlx-lm's own for linear attention.

    Raises:
        ContractError: an unknown preset, or a list of another length than the attention layers.
        UnsupportedError: a layer whose cache is neither a state nor attention to all tokens.
    """
    return quantized(mlx_lm_cache.make_prompt_cache(model), kv)


def quantized(caches: list[Any], kv: str | Sequence[str]) -> list[Any]:
    """mlx-lm's empty caches with those of attention quantized, as `make_prompt_cache` says."""
    attention = (mlx_lm_cache.KVCache, HadamoeKVCache)
    for i, c in enumerate(caches):
        if type(c) not in (*attention, mlx_lm_cache.ArraysCache):
            name = type(c).__name__
            raise UnsupportedError(f"kv: layer {i} has a {name}, which cannot be quantized")
    places = [i for i, c in enumerate(caches) if type(c) in attention]
    for i, form in zip(places, formats_of(kv, len(places)), strict=True):
        caches[i] = mlx_lm_cache.KVCache() if form.raw else HadamoeKVCache(form)
    return caches


class HadamoeKVCache(mlx_lm_cache._BaseCache):
    """Keys and values of one attention layer in pages of 64 tokens, as mlx-lm's caches are used.

    Page 0 and the newest page, not yet full, stay as they came; a page between is stored as codes
    when it is full. `update_and_fetch` returns the call's own tokens as they came, full pages of
    earlier calls as stored. So a token fed alone sees what hadamoe's own attention would show it
    (which also takes the noise of stored values out of its result), and a token of a prompt sees
    its own chunk unquantized: a prompt cut elsewhere gives slightly other numbers.

    Sequences of one batch are equally long; mlx-lm's batched generation uses `HadamoeBatchKVCache`.
    NaN is not refused: it is read back as NaN, but for codecs of other software on the CPU
    (`mlx_kv`).

    Attributes:
        offset: tokens stored.
        kept: lowest page but page 0 whose tokens are there as they came.
        sides: keys and values; nothing before the first token.
        attends: whether `attend` can be used.

    Args:
        form: codecs of keys and values.
    """

    def __init__(self, form: KVFormat) -> None:
        self.format = form
        self.offset = 0
        self.kept = 1
        self.sides = []

    @property
    def sides(self) -> list[Side]:
        if self._raw is not None:
            for side, rows in zip(self._sides, self._raw, strict=True):
                side.take(rows, self.offset, self.kept)
            self._raw = None
        return self._sides

    @sides.setter
    def sides(self, sides: list[Side]) -> None:
        self._sides = sides
        self._raw: mx.array | None = None  # while tokens come through attend(): `slots` of both

    @property
    def attends(self) -> bool:
        return bool(self.offset) and mlx_gpu.available()

    def attend(
        self, tokens: mlx_gpu_kv.Prepared, gate: mx.array | None = None, dtype: Any = mx.float32
    ) -> mx.array:
        """Stores a token and attends over the codes as they are, where `attends`.

        As `hadamoe.kv_ops.kv_attend`: the numbers of `update_and_fetch`, but that queries of coded
        keys are rounded to bytes and the noise of coded values is taken out.

        Args:
            tokens: of `hadamoe.mlx_gpu_kv.prepare` with ``form=self.format``, one per sequence.
            gate: the projection they came from; the result is times sigmoid of its gates.

        Returns:
            ``[b, 1, heads * d]`` of ``dtype``.
        """
        if self._raw is None:
            self._raw = mx.stack([side.slots(self.kept) for side in self._sides])
        page = self.offset // PAGE
        row = (slot(page) if page else 0) + self.offset % PAGE
        raw = self._raw[...]  # another name: the array that others may hold stays as it is
        raw[:, :, :, row : row + 1] = tokens.kv.astype(raw.dtype)
        self._raw, self.offset = raw, self.offset + 1
        pages = [side.pages for side in self._sides]
        y = mlx_gpu_kv.attend(tokens, raw, pages, self.offset, self.format, gate=gate, dtype=dtype)
        if page and self.offset % PAGE == 0:
            for side, rows in zip(self._sides, raw, strict=True):
                side.store(rows[:, :, None, slot(page) : slot(page) + PAGE])
            self.kept = max(self.kept, page)
        return y

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Stores keys and values ``[b, g, t, d]``.

        Raises:
            ContractError: a head dimension the codec cannot store.
        """
        if not self.sides:
            likes = zip(self.format, ("key", "value"), (keys, values), strict=True)
            self.sides = [Side.empty(*like) for like in likes]
        end = self.offset + keys.shape[2]
        keep = max(self.kept, end // PAGE - 1)
        for side, x in zip(self.sides, (keys, values), strict=True):
            side.append(x, self.offset, self.kept, keep)
        self.offset, self.kept = end, keep

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Stores keys and values ``[b, g, t, d]`` and returns all, ``[b, g, offset, d]`` each."""
        old_keys, old_values = self.seen()
        self.append(keys, values)
        return mx.concatenate([*old_keys, keys], 2), mx.concatenate([*old_values, values], 2)

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """All keys and values as the next token will see them."""
        keys, values = self.seen()
        return mx.concatenate(keys, 2), mx.concatenate(values, 2)

    def seen(self) -> list[list[mx.array]]:
        """`keys_and_values` in pieces ``[b, g, n, d]`` that lie one behind the other."""
        return [side.seen(self.offset, self.kept) for side in self.sides] or [[], []]

    @property
    def state(self) -> tuple:
        """What `mlx_lm.models.cache.save_prompt_cache` writes."""
        return (*self.format, self.offset, self.kept, [s.arrays for s in self.sides] or None)

    @state.setter
    def state(self, v: Sequence[Any]) -> None:
        key, value, self.offset, self.kept, arrays = v
        self.format = KVFormat(key, value)
        arrays = arrays or [None, None]
        parts = zip(self.format, ("key", "value"), arrays, strict=True)
        self.sides = [Side(*part) for part in parts if part[2] is not None]

    def is_trimmable(self) -> bool:
        """True; `trim` refuses what it cannot do exactly."""
        return True

    def trim(self, n: int) -> int:
        """Forgets the last n tokens without a trace and returns n, at most all.

        The last 64 tokens can always go, and any number that leaves whole pages or less than one.

        Raises:
            ContractError: a part of a page would stay that is no longer there as it came.
        """
        n = min(self.offset, n)
        offset = self.offset - n
        page = max(1, offset // PAGE)
        if offset > PAGE and offset % PAGE and page < self.kept:
            raise ContractError(
                f"trim: n={n} leaves {offset} of {self.offset} tokens, needs a multiple of {PAGE}, "
                f"less than {PAGE}, or at least {self.kept * PAGE}"
            )
        for side in self.sides:
            side.trim(offset, self.kept)
        self.offset, self.kept = offset, min(self.kept, page)
        return n

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        """As mlx-lm's plain cache."""
        return mlx_lm_cache.create_attention_mask(*args, offset=self.offset, **kwargs)

    def size(self) -> int:
        """Tokens stored."""
        return self.offset

    def empty(self) -> bool:
        """Whether nothing was ever stored."""
        return not self.sides

    @property
    def nbytes(self) -> int:
        """Bytes held: page 0, codes, and up to 127 newest tokens."""
        return sum(a.nbytes for side in self.sides for a in side.arrays)

    @classmethod
    def merge(cls, caches: Sequence[HadamoeKVCache]) -> HadamoeBatchKVCache:
        """Single sequences as a batch, for mlx-lm's batched generation."""
        return HadamoeBatchKVCache([cls.from_state(c.state) for c in caches])


class HadamoeBatchKVCache(mlx_lm_cache._BaseCache):
    """Sequences of different lengths, each in a `HadamoeKVCache` of its own; made by its ``merge``.

    Keys and values are returned padded on the left, as mlx-lm's `BatchKVCache` does; padding is
    never stored, so a sequence has the pages it would have alone.
    """

    def __init__(self, caches: list[HadamoeKVCache]) -> None:
        self.caches = caches
        self._left: list[int] | None = None  # real tokens still to come while prompts are padded

    @property
    def offset(self) -> mx.array:
        """Tokens of each sequence, i32 ``[b]``."""
        return mx.array([c.offset for c in self._caches])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """As `HadamoeKVCache.update_and_fetch`, ``[b, g, longest + t, d]`` each."""
        t, size = keys.shape[2], self.size()
        rows: tuple[list[mx.array], list[mx.array]] = ([], [])
        for i, c in enumerate(self.caches):
            new = [keys[i : i + 1], values[i : i + 1]]
            for row, old, x in zip(rows, c.seen(), new, strict=True):
                padding = mx.zeros((1, x.shape[1], size - c.offset, x.shape[3]), x.dtype)
                row.append(mx.concatenate([padding, *old, x], 2))
            count = t if self._left is None else min(t, self._left[i])
            if count:
                c.append(*(x[:, :, :count] for x in new))
            if self._left is not None:
                self._left[i] -= count
        return mx.concatenate(rows[0]), mx.concatenate(rows[1])

    @property
    def attends(self) -> bool:
        """Whether `attend` can be used."""
        return self._left is None and all(c.attends for c in self._caches)

    def attend(self, tokens: mlx_gpu_kv.Prepared, gate: mx.array | None = None) -> mx.array:
        """As `HadamoeKVCache.attend`, all sequences at once."""
        caches = self._caches
        if self._joint is None:
            self._joint = Joint([c.sides for c in caches], [c.kept for c in caches])
        y = self._joint.attend(tokens, [c.offset for c in caches], self.format, gate)
        for c in caches:
            c.offset += 1
            c.kept = max(c.kept, c.offset // PAGE - 1)
        return y

    @property
    def format(self) -> KVFormat:
        """Codecs of keys and values."""
        return self._caches[0].format

    @property
    def caches(self) -> list[HadamoeKVCache]:
        """The sequences, each by itself."""
        if self._joint is not None:
            self._joint.part([c.offset for c in self._caches], [c.kept for c in self._caches])
            self._joint = None
        return self._caches

    @caches.setter
    def caches(self, caches: list[HadamoeKVCache]) -> None:
        self._caches = caches
        self._joint: Joint | None = None  # while tokens come through attend()

    def prepare(self, *, left_padding: Any = None, lengths: Any = None, **_: Any) -> None:
        """Says how many of the coming tokens are real, the first ones of each row.

        Raises:
            UnsupportedError: tokens padded on the left, which mlx-lm's generation never has.
        """
        if left_padding is not None:
            raise UnsupportedError("kv: prompts padded on the left, needs them on the right")
        self._left = None if lengths is None else list(lengths)

    def finalize(self) -> None:
        """All coming tokens are real."""
        self._left = None

    @property
    def state(self) -> tuple:
        """What `mlx_lm.models.cache.save_prompt_cache` writes."""
        return self._left, [c.state for c in self.caches]

    @state.setter
    def state(self, v: Sequence[Any]) -> None:
        self._left, states = v
        self.caches = [HadamoeKVCache.from_state(s) for s in states]

    def is_trimmable(self) -> bool:
        """True; `trim` refuses what it cannot do exactly."""
        return True

    def trim(self, n: int) -> int:
        """`HadamoeKVCache.trim` of every sequence."""
        return max(c.trim(n) for c in self.caches)

    def make_mask(self, n: int, return_array: bool = False, **kwargs: Any) -> mx.array:
        """Which keys each of n queries sees: bool ``[b, 1, n, longest + n]``."""
        padding = mx.array([self.size() - c.offset for c in self._caches])
        return create_causal_mask(n, offset=self.size(), left_padding=padding, **kwargs)

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Keeps these sequences."""
        self.caches = [self.caches[i] for i in batch_indices]
        self._left = self._left and [self._left[i] for i in batch_indices]

    def extend(self, other: HadamoeBatchKVCache) -> None:
        """Takes another batch's sequences behind its own."""
        self.caches = self.caches + other.caches

    def extract(self, idx: int) -> HadamoeKVCache:
        """One sequence, by itself."""
        return HadamoeKVCache.from_state(self.caches[idx].state)

    def size(self) -> int:
        """Tokens of the longest sequence."""
        return max(c.offset for c in self._caches)

    def empty(self) -> bool:
        """Whether nothing was ever stored."""
        return all(c.empty() for c in self.caches)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(c.nbytes for c in self.caches)


# load_prompt_cache looks classes up by name in mlx-lm's own module
for _class in (HadamoeKVCache, HadamoeBatchKVCache):
    setattr(mlx_lm_cache, _class.__name__, _class)
