"""Whole models: prefill, decode, and what a long context costs with each format of the KV cache.

Contexts are filled with random keys and values, not by a prompt: what a token costs depends on how
many there are and not on what they say, and a prompt of 128k tokens would take an hour.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from . import inspect, torch_model, torch_run
from .errors import ContractError, DeviceError
from .kv import PAGE, formats_of, page_bytes
from .kv_cache import KVCache
from .kv_ops import kv_encode
from .profile import profile as take_apart
from .resident import available_bytes
from .torch_decode import Decoder, text_model

__all__ = [
    "ContextRow", "Opened", "PrefillRow", "check", "contexts", "load", "model", "prefills",
]  # fmt: skip

_UNIQUE = 16  # random pages, repeated

Progress = Callable[[str], None]


class Opened(NamedTuple):
    """A checkpoint in memory.

    Attributes:
        found: what it is. model: from `hadamoe.load`.
        resident: whether weights are in memory instead of mapped; ``copied``: their bytes.
        seconds: that opening took.
    """

    found: inspect.Report
    model: Any
    resident: bool
    copied: int
    seconds: float


def load(
    directory: str | os.PathLike[str],
    *,
    rope: str | None = None,
    device: str = "cpu",
    resident: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Opened:
    """Open a checkpoint to measure; arguments and errors as those of `hadamoe.load`."""
    copied = 0

    def copying(done: int, total: int) -> None:
        nonlocal copied
        copied = total
        if progress is not None:
            progress(done, total)

    found = inspect.describe(directory)
    start = time.perf_counter()
    loaded, _ = torch_model.load(
        directory, rope=rope, device=device, resident=resident, progress=copying
    )
    return Opened(found, loaded, resident, copied, time.perf_counter() - start)


def copy_bandwidth(device: torch.device, nbytes: int = 1 << 30) -> float:
    """1e9 bytes/s that copies within a GPU's memory read and write: the median of ten rounds."""
    x = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    y, times = torch.empty_like(x), []
    for _ in range(11):
        start = time.perf_counter()
        for _ in range(8):
            y.copy_(x)
        int(y[-1])  # waits
        times.append((time.perf_counter() - start) / 8)
    return 2 * nbytes / statistics.median(times[1:]) / 1e9


def model(
    opened: Opened,
    bandwidth: float,
    prompt_tokens: int,
    new_tokens: int,
    *,
    repeats: int = 3,
    profiled: bool = False,
) -> tuple[dict[str, Any], Any]:
    """Prefill and decode of a whole checkpoint, beside the time of reading its weights alone.

    Args:
        bandwidth: 1e9 bytes/s of reading alone, at the current number of threads.
        repeats: runs whose median rates are reported.
        profiled: also take one more run apart.

    Returns: (figures by name, `profile.Profile` or None).
    """
    found, loaded = opened.found, opened.model
    ids = _ids(prompt_tokens)
    torch_run.generate(loaded, ids, 2)  # maps the pages, wakes the threads
    runs = [torch_run.generate(loaded, ids, new_tokens) for _ in range(repeats)]
    decode = statistics.median(r.decode_rate for r in runs)
    floor, peak = found.token_bytes / bandwidth / 1e9, torch_run.peak_bytes()
    figures = {
        "format": found.format,
        "file GB": found.file_bytes / 1e9,
        "weights": "resident" if opened.resident else "mapped",
        "open s": opened.seconds,
        "runs": repeats,
        "prompt tokens": prompt_tokens,
        "prefill tok/s": statistics.median(r.prefill_rate for r in runs),
        "new tokens": new_tokens,
        "decode tok/s": decode,
        "read GB/token": found.token_bytes / 1e9,
        "floor tok/s": 1 / floor,
        "time over floor": 1 / (floor * decode),
        "resident GB": torch_run.resident_bytes() / 1e9,
        "peak GB": peak / 1e9,
    }
    if where := torch_run.device_memory(loaded):
        figures["GPU GB"] = where / 1e9
    if opened.resident:  # a mapped file is in memory in part, nobody knows which at the peak
        figures["peak over weights GB"] = (peak - opened.copied) / 1e9
    return figures, take_apart(loaded, ids, new_tokens) if profiled else None


@dataclass(frozen=True, slots=True)
class ContextRow:
    """Decoding at the end of a context.

    Attributes:
        kv: preset. context: tokens in the cache after the last new one.
        cache_bytes: that their keys and values take, as stored.
        seconds: of a token, in the median round. best: in the fastest one.
        floor: seconds that reading the weights and the cache takes at the read bandwidth.
    """

    kv: str
    context: int
    new_tokens: int
    cache_bytes: int
    seconds: float
    best: float
    floor: float


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """Seconds of a prompt until its first new token, in the median round and in the fastest."""

    kv: str
    prompt_tokens: int
    seconds: float
    best: float


def check(presets: Sequence[str], sizes: Sequence[int], new_tokens: int) -> None:
    """What `contexts` asks of its arguments.

    Raises:
        ContractError: an unknown preset, or a context too short for the new tokens.
    """
    for name in presets:
        formats_of(name, 1)
    for size in sizes:
        if size < new_tokens + 2:
            raise ContractError(
                f"bench: a context of {size} tokens, needs at least {new_tokens + 2}: "
                f"{new_tokens} are new"
            )


def contexts(
    opened: Opened,
    bandwidth: float,
    presets: Sequence[str],
    sizes: Sequence[int],
    new_tokens: int,
    *,
    repeats: int = 3,
    progress: Progress = lambda _: None,
) -> list[ContextRow]:
    """Decode the same ``new_tokens`` at the end of every context with every preset, in turn.

    Args:
        bandwidth: 1e9 bytes/s of reading alone, at the current number of threads.
        presets: of `hadamoe.kv`, or KEY/VALUE of two codecs. sizes: contexts in tokens.

    Raises:
        ContractError: as `check`.
        DeviceError: less memory is available than the largest cache takes.
    """
    check(presets, sizes, new_tokens)
    _check_memory(opened.model, presets, max(sizes))
    rows = []
    for size in sizes:
        times: dict[str, list[float]] = {name: [] for name in presets}
        taken = {}
        for n in range(repeats):
            for name in _order(presets, n):
                progress(f"context {size:,}, {name}, round {n + 1} of {repeats}")
                seconds, taken[name] = _decode(opened.model, name, size, new_tokens)
                times[name].append(seconds)
        for name, t in times.items():
            floor = (opened.found.token_bytes + taken[name]) / bandwidth / 1e9
            median = statistics.median(t)
            rows.append(ContextRow(name, size, new_tokens, taken[name], median, min(t), floor))
    return rows


def prefills(
    opened: Opened,
    presets: Sequence[str],
    tokens: int,
    *,
    repeats: int = 3,
    progress: Progress = lambda _: None,
) -> list[PrefillRow]:
    """The same prompt with every preset of `contexts`, in turn."""
    times: dict[str, list[float]] = {name: [] for name in presets}
    ids = _ids(tokens)
    for n in range(repeats):
        for name in _order(presets, n):
            progress(f"prompt of {tokens:,}, {name}, round {n + 1} of {repeats}")
            decoder = Decoder(opened.model, tokens, kv=name)
            with torch_run.one_torch_thread():
                start = time.perf_counter()
                decoder.top(decoder.feed(ids), 1)
                times[name].append(time.perf_counter() - start)
    return [PrefillRow(name, tokens, statistics.median(t), min(t)) for name, t in times.items()]


def _order(presets: Sequence[str], turn: int) -> Sequence[str]:
    """Back and forth: a machine's speed drifts."""
    return presets[::-1] if turn % 2 else presets


def _ids(count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, count)))


def _decode(model: Any, kv: str, size: int, new_tokens: int) -> tuple[float, int]:
    """(seconds of a token, bytes of the cache) up to ``size`` tokens."""
    decoder = Decoder(model, size, kv=kv)
    _fill(decoder, size - new_tokens - 1)
    ids = _ids(new_tokens + 1)
    with torch_run.one_torch_thread():
        for n in range(new_tokens + 1):
            if n == 1:  # the first one met pages that this process had never read
                start = time.perf_counter()
            decoder.top(decoder.feed(ids[:, n : n + 1]), 1)
        seconds = (time.perf_counter() - start) / new_tokens
    if decoder.cache is not None:
        return seconds, decoder.cache.nbytes
    return seconds, sum(k.nbytes + v.nbytes for k, v in _states(decoder)) * size // decoder.capacity


def _states(decoder: Decoder) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Unquantized keys and values of the attention layers."""
    pairs = zip(decoder.text.layers, decoder.states, strict=True)
    return [states for layer, states in pairs if not layer.linear]


def _fill(decoder: Decoder, tokens: int) -> None:
    """Random keys and values for the first tokens of an empty decoder."""
    if decoder.cache is not None:
        _fill_pages(decoder.cache, tokens)
    else:
        for states in _states(decoder):
            for x in states:
                some = x[:, :, : min(tokens, _UNIQUE * PAGE)].normal_()
                for at in range(some.shape[2], tokens, some.shape[2]):
                    part = x[:, :, at : min(tokens, at + some.shape[2])]
                    part.copy_(some[:, :, : part.shape[2]])
    decoder.length = tokens


def _fill_pages(cache_: KVCache, tokens: int) -> None:
    cache_.reserve(tokens)
    places = cache_.table[0, 1 : tokens // PAGE]
    for i, kind in enumerate(cache_.formats):
        layer = cache_.layer(i)
        for side, pages, raw in zip(
            ("key", "value"), (layer.key_pages, layer.value_pages),
            (layer.raw_keys, layer.raw_values), strict=True,
        ):  # fmt: skip
            some = _pages(getattr(kind, side), side, cache_.head_dim)
            pages[places] = np.resize(some, (len(places), some.shape[1]))[:, None]
            bits = raw.view(np.int16) if raw.dtype == np.uint16 else raw  # torch lacks much of u16
            floats = torch.from_numpy(bits)
            (floats.view(torch.bfloat16) if bits is not raw else floats).normal_()
    cache_.advance()


@cache
def _pages(codec: str, side: str, head_dim: int) -> np.ndarray:
    """u8 [pages, bytes]."""
    rows = np.random.default_rng(0).standard_normal((_UNIQUE, PAGE, head_dim), np.float32)
    return kv_encode(rows, codec, side=side)


def _check_memory(model: Any, presets: Sequence[str], tokens: int) -> None:
    config = text_model(model).config
    heads, layers = config.num_key_value_heads, config.layer_types.count("full_attention")
    sides = [sum(page_bytes(codec, config.head_dim) for codec in formats_of(name, 1)[0])
             for name in presets]  # fmt: skip
    need, have = layers * heads * tokens * max(sides) // PAGE, available_bytes()
    if have is not None and need > have:
        raise DeviceError(
            f"bench: a cache of {tokens:,} tokens needs {need / 1e9:.2f} GB of memory, "
            f"{have / 1e9:.2f} GB are available"
        )
