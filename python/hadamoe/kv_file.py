"""A quantized KV cache as one safetensors file; nothing is believed before it is checked."""

from __future__ import annotations

import json
import os
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import DTYPES, Shard
from .errors import ContractError, FormatError
from .kv import CODECS, PAGE, page_bytes
from .strict_json import parse_json

__all__ = ["load", "save"]

_KIND = "hadamoe-kv"
_RAW = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def save(cache: Any, version: int, path: str | PathLike[str]) -> None:
    """Writes the file of `KVCache.save`."""
    cache.check_whole()
    pages = cache.lengths // PAGE
    table = cache.table[:, : pages.max()].copy()
    table[np.arange(pages.max()) >= pages[:, None]] = -1  # what a pass under way is to fill
    used, at = np.unique(table[table >= 0], return_inverse=True)
    table[table >= 0] = at
    tensors: dict[str, tuple[str, np.ndarray]] = {
        "lengths": ("I64", cache.lengths),
        "raw_from": ("I64", np.minimum(cache.raw_from, np.maximum(pages, 1))),
        "kept_from": ("I64", cache.kept_from),
        "table": ("I32", table),
    }
    for name in ("vectors", "scales"):
        if (value := getattr(cache, name)) is not None:
            tensors[name] = ("F32", value)
    raw = _RAW[cache.dtype]
    for i in range(len(cache.formats)):
        tensors[f"layers.{i}.raw_keys"] = (raw, cache.raw_keys[i])
        tensors[f"layers.{i}.raw_values"] = (raw, cache.raw_values[i])
    for i in range(len(cache.formats)):
        tensors[f"layers.{i}.key_pages"] = ("U8", cache.pool.keys[i][used])
        tensors[f"layers.{i}.value_pages"] = ("U8", cache.pool.values[i][used])
    facts = {
        "formats": [list(f) for f in cache.formats], "heads": cache.heads,
        "head_dim": cache.head_dim, "dtype": cache.dtype, "window": cache.window,
    }  # fmt: skip
    metadata = {"kind": _KIND, "version": str(version), "cache": json.dumps(facts)}
    _write(Path(path), metadata, tensors)


def _write(path: Path, metadata: dict[str, str], tensors: dict[str, Any]) -> None:
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, array) in tensors.items():  # widest numbers first: none is misaligned
        begin, end = end, end + array.nbytes
        shape = list(array.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for _, array in tensors.values():
                f.write(np.ascontiguousarray(array).data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class _File:
    """The file's tensors; each is asked for by dtype and shape."""

    def __init__(self, path: Path, version: int) -> None:
        self.path, self.shard, self.asked = path, Shard(path), set()
        meta = self.shard.metadata
        for name, needs in (("kind", _KIND), ("version", str(version))):
            if meta.get(name) != needs:
                self.fail("__metadata__", f"{name} {needs!r}", repr(meta.get(name)))
        facts = parse_json(meta.get("cache", "").encode(), path, "a KV cache's facts")
        names = {"formats", "heads", "head_dim", "dtype", "window"}
        if facts.keys() != names:
            self.fail("__metadata__", f"a cache with {sorted(names)}", str(sorted(facts)))
        for name in ("heads", "head_dim", "window"):
            value = facts[name]
            if not (type(value) is int and value > 0) and (name != "window" or value is not None):
                self.fail("__metadata__", f"{name} above 0", repr(value))
        if facts["dtype"] not in list(_RAW):
            self.fail("__metadata__", f"a dtype of {', '.join(_RAW)}", repr(facts["dtype"]))
        formats = facts["formats"]
        if type(formats) is not list or not formats or not all(map(_is_format, formats)):
            self.fail("__metadata__", "two codecs for each layer", repr(formats)[:80])
        self.facts = facts

    def fail(self, tensor: str | None, expected: str, found: str) -> None:
        raise FormatError(self.path, tensor, expected=expected, found=found)

    def take(self, name: str, dtype: str, shape: tuple[int | None, ...]) -> np.ndarray:
        """A view of a tensor; None in a shape is any size."""
        self.asked.add(name)
        entry = self.shard.entries.get(name)
        needs = f"{dtype} [{', '.join('n' if s is None else str(s) for s in shape)}]"
        if entry is None:
            self.fail(name, needs, "no such tensor")
        fits = len(entry[1]) == len(shape) and all(
            want in (None, have) for want, have in zip(shape, entry[1], strict=True)
        )
        if entry[0] != dtype or not fits:
            self.fail(name, needs, f"{entry[0]} {list(entry[1])}")
        size = prod(entry[1]) * DTYPES[dtype].itemsize
        flat = self.shard.data[entry[2] : entry[2] + size]
        return flat.view(DTYPES[dtype]).reshape(entry[1])

    def finite(self, name: str, array: np.ndarray) -> np.ndarray:
        """The array."""
        bf16 = array.dtype == np.uint16
        bad = (array & 0x7F80) == 0x7F80 if bf16 else ~np.isfinite(array)
        if bad.any():
            self.fail(name, "finite numbers", f"{int(bad.sum())} that are not")
        return array


def load(cls: type, version: int, path: str | PathLike[str], tokens: int | None) -> Any:
    """Reads the file of `KVCache.save` into a new cache of cls."""
    f = _File(Path(path), version)
    heads, d, dtype = f.facts["heads"], f.facts["head_dim"], f.facts["dtype"]
    formats, window = f.facts["formats"], f.facts["window"]
    lengths = f.take("lengths", "I64", (None,))
    batch = len(lengths)
    if not batch or lengths.min() < 0 or lengths.max() > 1 << 40:
        f.fail("lengths", "lengths of 0 or more", str(lengths[:8].tolist()))
    raw_from, kept_from = (f.take(n, "I64", (batch,)) for n in ("raw_from", "kept_from"))
    full = lengths // PAGE
    table = f.take("table", "I32", (batch, int(full.max())))
    try:
        sizes = [[page_bytes(codec, d) for codec in pair] for pair in formats]
    except ContractError as e:
        f.fail("__metadata__", "a head_dim its codecs can store", str(e))
    used = f.take("layers.0.key_pages", "U8", (None, heads, sizes[0][0])).shape[0]
    _check_table(f, table, used, full, kept_from)
    _check_lengths(f, lengths, raw_from, kept_from, window)
    raw, pages = [], []
    for i, (key, value) in enumerate(sizes):
        at = f"layers.{i}."
        for side, size in (("key", key), ("value", value)):
            name = f"{at}raw_{side}s"
            raw.append(f.finite(name, f.take(name, _RAW[dtype], (batch, heads, 3, PAGE, d))))
            pages.append(f.take(f"{at}{side}_pages", "U8", (used, heads, size)))
    optional = {"vectors": (len(formats), 4, heads, d), "scales": (len(formats), 2)}
    given = {n: f.take(n, "F32", s) for n, s in optional.items() if n in f.shard.entries}
    if extra := f.shard.entries.keys() - f.asked:
        f.fail(min(extra), "no such tensor", "one")
    names = ["/".join(pair) for pair in formats]
    try:
        cache = cls(
            len(formats), heads, d, names[0] if len(set(names)) == 1 else names, batch=batch,
            dtype=dtype, tokens=tokens, window=window, **given,
        )  # fmt: skip
    except ContractError as e:
        f.fail(None, "a cache", str(e))
    if tokens is not None and lengths.max() > tokens:
        raise ContractError(f"kv: tokens is {tokens}, needs {lengths.max()} of the file at least")
    _fill(cache, table, raw, pages)
    cache.lengths, cache.raw_from, cache.kept_from = (
        a.copy() for a in (lengths, raw_from, kept_from)
    )
    return cache


def _fill(cache: Any, table: np.ndarray, raw: list[np.ndarray], pages: list[np.ndarray]) -> None:
    """raw and pages: keys and values of each layer in turn."""
    places = np.array(cache.pool.take(len(pages[0])), np.int32)
    for arrays, new in ((cache.pool.keys, pages[::2]), (cache.pool.values, pages[1::2])):
        for to, source in zip(arrays, new, strict=True):
            to[places] = source
    for arrays, new in ((cache.raw_keys, raw[::2]), (cache.raw_values, raw[1::2])):
        for to, source in zip(arrays, new, strict=True):
            to[:] = source
    cache.widen(table.shape[1])
    cache.table[:, : table.shape[1]][table >= 0] = places[table[table >= 0]]
    cache.pool.hold(cache.places())
    cache.pool.release(places)  # of `take`


def _is_format(pair: Any) -> bool:
    return type(pair) is list and len(pair) == 2 and all(c in list(CODECS) for c in pair)


def _check_table(
    f: _File, table: np.ndarray, used: int, full: np.ndarray, kept_from: np.ndarray
) -> None:
    columns = np.arange(table.shape[1])
    coded = (columns >= np.maximum(kept_from, 1)[:, None]) & (columns < full[:, None])
    inside = (table >= 0) & (table < used)
    if (bad := np.where(coded, ~inside, table != -1)).any():
        s, p = np.argwhere(bad)[0]
        needs = f"0 to {used - 1}" if coded[s, p] else "-1"
        f.fail("table", f"{needs} for page {p} of sequence {s}", str(table[s, p]))
    if len(found := np.unique(table[coded])) != used:
        f.fail("layers.0.key_pages", f"{len(found)} pages, as the table names", str(used))


def _check_lengths(
    f: _File, lengths: np.ndarray, raw_from: np.ndarray, kept_from: np.ndarray, window: int | None
) -> None:
    full = np.maximum(lengths // PAGE, 1)
    if ((raw_from < 1) | (raw_from > full)).any():
        f.fail("raw_from", "pages from 1 to the open one", str(raw_from.tolist()[:8]))
    most = np.ones_like(full) if window is None else np.maximum(full - window, 1)
    if ((kept_from < 1) | (kept_from > most)).any():
        f.fail("kept_from", "pages from 1 to the first one seen", str(kept_from.tolist()[:8]))
