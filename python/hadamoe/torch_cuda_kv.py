"""Keys and values of attention on CUDA: raw rows and coded pages in memory that stays in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from . import cuda_kv, torch_cuda
from .cuda_kv import RAW, Heads
from .errors import ContractError
from .gpu_calls import dtype_name
from .kv import KEY_SEED, PAGE, VALUE_SEED, KVFormat, formats_of, page_bytes, signs
from .reference_kv_peers import TURBO_CODEBOOKS
from .torch_kv import KVChoice

__all__ = ["RUN", "KVStates"]

Tensor = torch.Tensor

#: Tokens that capacities are multiples of: a run of pages.
RUN = 8 * PAGE
_SIDES = ("key", "value")


def _tables(form: KVFormat, d: int, device: torch.device) -> dict[str, Tensor | None]:
    """What a layer's codecs read."""
    made: dict[str, np.ndarray | None] = {"book": None}
    for side, codec, seed in zip(_SIDES, form, (KEY_SEED, VALUE_SEED), strict=True):
        made[f"{side}_signs"] = signs(d, seed) if cuda_kv.rotated(codec) else None
    if any(codec.startswith("turbo") for codec in form):
        made["book"] = np.concatenate([_book(codec, d) for codec in form])
    array = torch_cuda.front(device).array
    return {name: None if a is None else array(a) for name, a in made.items()}


@cache
def _book(codec: str, d: int) -> np.ndarray:
    """f32 ``[16]``: a turbo codec's centroids, zeros for others."""
    book = TURBO_CODEBOOKS[d, int(codec[-1])] if codec.startswith("turbo") else np.zeros(0, "f4")
    return np.pad(book.astype(np.float32), (0, 16 - len(book)))


class _Layer:
    """Raw rows ``[2, b, g, 192, d]`` and pages u8 ``[b, g, m, bytes]`` of one layer's keys and
    values: page 0 is raw for good, page p's raw rows begin at 64 (1 + p % 2)."""

    def __init__(self, heads: Heads, pages: int, dtype: torch.dtype, device: torch.device) -> None:
        self.heads = heads
        raw, *coded = heads.raw(dtype_name(dtype)), *heads.pages((heads.batch, pages))
        self.raw = torch.zeros(raw.shape, dtype=dtype, device=device)
        self.key_pages, self.value_pages = (
            torch.zeros(out.shape, dtype=torch.uint8, device=device) for out in coded
        )
        self.tables = _tables(heads.format, heads.d, device)

    @property
    def arrays(self) -> dict[str, Tensor | None]:
        """What launches read and write, by name."""
        mine = {name: getattr(self, name) for name in ("raw", "key_pages", "value_pages")}
        return mine | self.tables


class KVStates:
    """Keys and values of a batch, in all attention layers.

    Args:
        choice: how they are kept. query: query heads.
        capacity: tokens of a sequence, a multiple of `RUN`.
        dtype: of raw rows.
        rope: radians a position f32 ``[rotary / 2]``, the factor of cosines and sines.

    Nothing is allocated before `allocate`.
    """

    def __init__(
        self, choice: KVChoice, query: int, batch: int, capacity: int, dtype: torch.dtype,
        rope: tuple[Tensor, float],
    ) -> None:  # fmt: skip
        self.given = choice, query
        self.batch, self.capacity, self.dtype, self.rope = batch, capacity, dtype, rope
        formats = formats_of(choice.kv, choice.layers)
        scales = [(1.0, 1.0)] * choice.layers if choice.scales is None else choice.scales
        self.heads = [
            Heads(batch, query, choice.heads, choice.head_dim, form, tuple(map(float, pair)))
            for form, pair in zip(formats, scales, strict=True)
        ]
        self.layers: list[_Layer] = []
        self.placed = True  # whether positions count stored tokens, as where there are no images

    def allocate(self) -> None:
        """Makes room, zeros."""
        pages, device = self.capacity // PAGE, self.rope[0].device
        self.layers = [_Layer(heads, pages, self.dtype, device) for heads in self.heads]

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values, coded."""
        return sum(
            h.kv * page_bytes(codec, h.d) for h in self.heads for codec in h.format
        ) // PAGE  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of all there is room for."""
        raw = sum(2 * h.kv * RAW * h.d for h in self.heads) * self.dtype.itemsize
        return self.batch * (raw + self.token_bytes * self.capacity)

    def grown(self, capacity: int) -> KVStates:
        """The same with more room, not allocated."""
        other = KVStates(*self.given, self.batch, capacity, self.dtype, self.rope)
        other.placed = self.placed
        return other

    def copy_from(self, other: KVStates) -> None:
        """Takes over what a smaller one holds."""
        for new, old in zip(self.layers, other.layers, strict=True):
            new.raw.copy_(old.raw)
            for a, b in ((new.key_pages, old.key_pages), (new.value_pages, old.value_pages)):
                a[:, :, : b.shape[2]] = b

    def select(self, pick: Callable[[Tensor, int], Tensor], batch: int) -> None:
        """Keeps sequences: ``pick`` those along a dimension."""
        self.batch, self.heads = batch, [h._replace(batch=batch) for h in self.heads]
        for layer, heads in zip(self.layers, self.heads, strict=True):
            layer.heads, layer.raw = heads, pick(layer.raw, 1)
            layer.key_pages = pick(layer.key_pages, 0)
            layer.value_pages = pick(layer.value_pages, 0)

    def check_trim(self, now: int, then: int) -> None:
        """Raises ContractError where tokens from ``then`` to ``now`` are no longer raw."""
        last, page = (now - 1) // PAGE, then // PAGE
        if page and page < last - 1:
            raise ContractError(
                f"kv: trimming {now} tokens to {then} reaches into page {page}, raw are page 0, "
                f"{last - 1} and {last}"
            )

    def past(self, i: int, sequence: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[g, length, d]`` of a layer and a sequence, decoded."""
        layer, full = self.layers[i], length // PAGE
        both = []
        for side, name in enumerate(_SIDES):
            raw = layer.raw[side, sequence]
            pieces = [raw[:, : min(length, PAGE)]]
            if full > 1:
                pages = getattr(layer, f"{name}_pages")[sequence, :, 1:full]
                pieces.append(self._decoded(layer, side, pages))
            if full and length % PAGE:
                begin = PAGE * (1 + full % 2)
                pieces.append(raw[:, begin : begin + length % PAGE])
            both.append(torch.cat(pieces, 1))
        return both[0], both[1]

    def _decoded(self, layer: _Layer, side: int, pages: Tensor) -> Tensor:
        """``[g, 64 m, d]`` of u8 ``[g, m, bytes]``."""
        groups, count, width = pages.shape
        heads, codec = layer.heads, layer.heads.format[side]
        launch = cuda_kv.decode(
            groups * count, codec, _SIDES[side], heads.d, dtype_name(self.dtype),
            heads.scales[side],
        )  # fmt: skip
        book = layer.tables["book"]
        arrays = {
            "pages": pages.reshape(-1, width),
            "signs": layer.tables[f"{_SIDES[side]}_signs"],
            "book": None if book is None else book[16 * side : 16 * side + 16],
        }
        return torch_cuda.run(launch, arrays)[0].reshape(groups, -1, heads.d)

    def attend(
        self, i: int, proj: Tensor, norms: tuple[Tensor, Tensor], eps: float, at: Tensor
    ) -> Tensor:
        """Attention of one token of every sequence, which is stored: ``[b, h d]`` of the projection
        ``[b, (2 h + 2 g) d]``, times its gates, in three launches.

        Args:
            norms: f32 ``[d]`` of queries and of keys, and their eps.
            at: i32 ``[2, b]``: positions, and tokens that are stored.
        """
        layer, heads, dtype = self.layers[i], self.layers[i].heads, dtype_name(self.dtype)
        freqs, stretch = self.rope
        launch = cuda_kv.prepare(
            heads, 1, 2 * len(freqs), dtype, eps=eps, stretch=stretch, placed=self.placed
        )
        arrays = {
            "proj": proj, "q_norm": norms[0], "k_norm": norms[1], "freqs": freqs,
            "signs": layer.tables["key_signs"], "offsets": at[0],
        }  # fmt: skip
        q, kv, x, factors = torch_cuda.run(launch, arrays | {"raw": layer.raw})
        if not self.placed:
            self.append(i, kv, at[1])
        pages = self.capacity // PAGE
        launch = cuda_kv.runs(heads, pages, 0, dtype, more=1)
        arrays = layer.arrays | {"q": q, "x": x, "factors": factors, "lengths": at[1]}
        parts, sums, *_ = torch_cuda.run(launch, arrays)
        launch = cuda_kv.join(heads, cuda_kv.slots(pages), proj.shape[-1], "float32", more=1)
        arrays = {"parts": parts, "sums": sums, "gate": proj, "lengths": at[1]}
        return torch_cuda.run(launch, arrays | {"signs": layer.tables["value_signs"]})[0]

    def append(self, i: int, kv: Tensor, lengths: Tensor, counts: Tensor | None = None) -> None:
        """Stores tokens ``[2, b, g, t, d]`` behind ``lengths`` i32 ``[b]``: the last ``counts`` i32
        ``[b]`` of them, or all."""
        layer = self.layers[i]
        launch = cuda_kv.append(
            layer.heads, kv.shape[3], self.capacity // PAGE, 0, dtype_name(self.dtype),
            counts=counts is not None, table=False,
        )  # fmt: skip
        arrays = {"kv": kv, "lengths": lengths, "counts": counts}
        torch_cuda.run(launch, layer.arrays | arrays)
