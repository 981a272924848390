"""The quantized cache's launches on numpy arrays, in the simulator: what its CUDA tests call."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from cuda_cases import to_torch
from simt import cuda_launch

from hadamoe import cuda_kv
from hadamoe.kv import CODECS, KEY_SEED, VALUE_SEED, KVFormat, signs
from hadamoe.reference_kv_peers import TURBO_CODEBOOKS


def codecs_of(d: int) -> list[str]:
    """Codecs that can store heads of d columns."""
    wide = ("turbo", "affine") if d < 64 else ()
    return [codec for codec in CODECS if not codec.startswith(wide)]


def signs_of(side: str, d: int) -> torch.Tensor:
    return to_torch(signs(d, KEY_SEED if side == "key" else VALUE_SEED).copy())


def book_of(codec: str, d: int) -> torch.Tensor:
    if not codec.startswith("turbo"):
        return torch.zeros(16)
    book = TURBO_CODEBOOKS[d, int(codec[-1])]
    return to_torch(np.pad(book, (0, 16 - len(book))))


def tables_of(form: KVFormat, d: int) -> dict[str, torch.Tensor]:
    """Signs and centroids of both sides."""
    books = torch.cat([book_of(codec, d) for codec in form])
    return {"key_signs": signs_of("key", d), "value_signs": signs_of("value", d), "book": books}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def encode(rows: Any, codec: str, side: str, scale: float = 1.0) -> np.ndarray:
    """`kv_ops.kv_encode` of ``[p, 64, d]``, numpy or torch."""
    rows, d = to_torch(rows), rows.shape[-1]
    launch = cuda_kv.encode(len(rows), codec, side, d, scale, name_of(rows.dtype))
    arrays = {"rows": rows, "signs": signs_of(side, d), "book": book_of(codec, d)}
    return cuda_launch.run(launch, arrays)[0].numpy()


def decode(
    pages: np.ndarray, codec: str, side: str, d: int, scale: float = 1.0, dtype: str = "float32",
    table: np.ndarray | None = None,
) -> torch.Tensor:  # fmt: skip
    """`kv_ops.kv_decode`, as a tensor; of ``[places, g, bytes]`` with a table."""
    shape = len(pages)
    if table is not None:
        shape = (len(table), pages.shape[1], table.shape[1])
    launch = cuda_kv.decode(shape, codec, side, d, dtype, scale)
    arrays = {"pages": to_torch(pages), "signs": signs_of(side, d), "book": book_of(codec, d)}
    arrays["table"] = to_torch(table)
    return cuda_launch.run(launch, arrays)[0]


class Cache:
    """A layer's cache on CUDA, all sequences' pages side by side or in a pool behind a table."""

    def __init__(
        self, form: KVFormat, heads: tuple[int, int], raw: torch.Tensor, pages: list,
        table: np.ndarray | None = None, scales: tuple[float, float] = (1.0, 1.0),
    ):  # fmt: skip
        b, d = raw.shape[1], raw.shape[-1]
        self.heads = cuda_kv.Heads(b, *heads, d, form, scales)
        self.raw, self.pages, self.table = raw, pages, to_torch(table)
        self.m = pages[0].shape[2] if table is None else table.shape[1]
        self.tables = tables_of(form, d)

    @property
    def state(self) -> dict[str, torch.Tensor]:
        return {"raw": self.raw, "key_pages": self.pages[0], "value_pages": self.pages[1]}

    def prepare(self, proj: torch.Tensor, lengths: list[int]) -> dict[str, torch.Tensor]:
        """A token of each sequence to its place; no norm, no positions."""
        launch = cuda_kv.prepare(
            self.heads, 1, 0, name_of(self.raw.dtype), eps=None, placed=True,
            dtype=name_of(proj.dtype),
        )  # fmt: skip
        arrays = {"proj": proj, "offsets": lengths, "signs": self.tables["key_signs"]}
        q, _, x, factors = cuda_launch.run(launch, arrays | {"raw": self.raw})
        return {"q": q, "x": x, "factors": factors}

    def append(self, kv: torch.Tensor, lengths: list[int], counts: list[int] | None = None) -> None:
        launch = cuda_kv.append(
            self.heads, kv.shape[3], self.m, 0, name_of(kv.dtype), counts=counts is not None,
            table=self.table is not None,
        )  # fmt: skip
        arrays = {"kv": kv, "lengths": lengths, "counts": counts, "table": self.table}
        cuda_launch.run(launch, arrays | self.tables | self.state)

    def attend(
        self, proj: torch.Tensor, lengths: list[int], gated: bool = False, dtype: str = "float32"
    ) -> torch.Tensor:
        """A token of each sequence after `lengths`: ``[b, h d]``."""
        token = self.prepare(proj, lengths)
        launch = cuda_kv.runs(
            self.heads, self.m, 0, name_of(self.raw.dtype), table=self.table is not None,
            places=len(self.pages[0]), more=1,
        )  # fmt: skip
        arrays = {"lengths": lengths, "table": self.table} | self.tables
        parts, sums, *_ = cuda_launch.run(launch, arrays | token | self.state)
        width = proj.shape[-1] if gated else 0
        launch = cuda_kv.join(
            self.heads, parts.shape[2], width, dtype, gate_dtype=name_of(proj.dtype), more=1
        )
        arrays |= {"parts": parts, "sums": sums, "gate": proj, "signs": self.tables["value_signs"]}
        return cuda_launch.run(launch, arrays)[0]
