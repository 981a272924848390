"""Whole models on an NVIDIA GPU: what bench/gpu.py measures of synthetic checkpoints."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_kernels import DEVICE, Clock
from steps import attempt

import hadamoe
from hadamoe import inspect, synth, torch_run


@dataclass(frozen=True)
class Sizes:
    """How much is measured; a GPU box takes the defaults."""

    pool: int = 512 << 20
    copy: int = 2 << 30
    shape: str = "full"
    prompt: int = 4096
    context: int = 32768
    tokens: int = 128
    batches: tuple[int, ...] = (8, 32)
    minutes: float = 9.0

    @property
    def short(self) -> int:
        """Tokens of a prompt that only begins a text."""
        return min(self.prompt, 64)


def models(folder: Path, copy: float, sizes: Sizes, clock: Clock) -> Iterator[dict[str, Any]]:
    """Every format, one at a time; the first two are the ones with a target."""
    order = sorted(synth.FORMATS, key=lambda n: n not in ("jangtq2", "config-i"))
    for name in order:
        if clock.left < 45:
            yield {"format": name, "left_out": "no time"}
            continue
        directory = folder / name
        try:
            synth.plan(name, synth.PRESETS[sizes.shape]).write(directory)
            per_token = inspect.describe(directory).token_bytes
            start = time.perf_counter()
            model, _ = hadamoe.load(directory, device=DEVICE)
            row = {"format": name, "load_s": time.perf_counter() - start}
            row |= attempt(lambda m=model: speed(m, sizes))
            if "decode" in row:
                row["gbytes"] = row["decode"] * per_token / 1e9
                row["of_copy"] = row["gbytes"] / copy
            row["kernels"] = attempt(lambda m=model: kernels(m, sizes))
            if name == "jangtq2":
                row["long"] = attempt(lambda d=directory: long_context(d, sizes))
            yield row
            del model
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            gc.collect()
            torch.cuda.empty_cache()


def ids(tokens: int, batch: int = 1) -> torch.Tensor:
    """Random byte tokens; every vocabulary has them."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (batch, tokens)))


def speed(model: Any, sizes: Sizes) -> dict[str, Any]:
    """Tokens a second: a prompt, decoding alone and in batches."""
    torch_run.generate(model, ids(sizes.short), 2)
    run = torch_run.generate(model, ids(sizes.prompt), 2)
    alone = torch_run.generate(model, ids(sizes.short), sizes.tokens)
    row = {"prompt": run.prefill_rate, "decode": alone.decode_rate}
    for batch in sizes.batches:
        row[f"batch_{batch}"] = batched(model, batch, sizes)
    row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def batched(model: Any, batch: int, sizes: Sizes) -> float:
    """Tokens a second of all sequences together: long generations less short ones."""
    times = []
    for count in (2, 2, 2 + sizes.tokens):  # the first captures
        start = time.perf_counter()
        model.generate(
            ids(sizes.short, batch).to(model.device),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
        )
        times.append(time.perf_counter() - start)  # generate() has read its tokens
    return batch * sizes.tokens / (times[2] - times[1])


def kernels(model: Any, sizes: Sizes) -> dict[str, Any]:
    """Microseconds a decoded token spends in each kernel, and between them: what more tokens take
    behind the same prompt."""
    tokens, prompt = sizes.tokens, ids(sizes.short)
    few, many = kernel_times(model, prompt, 1), kernel_times(model, prompt, 1 + tokens)
    rows = [
        {
            "kernel": name[:120],
            "us": (us - few.get(name, (0.0, 0))[0]) / tokens,
            "launches": (count - few.get(name, (0.0, 0))[1]) / tokens,
        }
        for name, (us, count) in many.items()
    ]
    busy = sum(row["us"] for row in rows)
    token = 1e6 / torch_run.generate(model, prompt, 1 + tokens).decode_rate
    rows.sort(key=lambda row: -row["us"])
    return {"token_us": token, "busy_us": busy, "gap_us": token - busy, "rows": rows}


def kernel_times(model: Any, prompt: torch.Tensor, tokens: int) -> dict[str, tuple[float, int]]:
    """Kernel -> (microseconds, launches) of a prompt and tokens behind it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        torch_run.generate(model, prompt, tokens)
    return {e.key: (e.self_device_time_total, e.count) for e in found.key_averages()}


def long_context(directory: Path, sizes: Sizes) -> dict[str, Any]:
    """Decoding behind a long prompt, over each cache."""
    rates = {}
    for kv in ("bf16", "hk4v3"):
        model, _ = hadamoe.load(directory, device=DEVICE, kv=kv)
        rates[kv] = torch_run.generate(model, ids(sizes.context), sizes.tokens).decode_rate
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return rates


def tiny(folder: Path) -> None:
    """Every format's tiny checkpoint, a prompt in tiles and some tokens: what sanitizers watch."""
    for name in synth.FORMATS:
        synth.plan(name, synth.TINY).write(folder / name)
        for kv in ("bf16", "hk4v3"):
            model, _ = hadamoe.load(folder / name, device=DEVICE, kv=kv)
            torch_run.generate(model, ids(70), 5)


def show_model(row: dict[str, Any]) -> str:
    """The lines of a model."""
    if "decode" not in row:
        return f"{row['format']:10} {row.get('left_out') or row.get('broke')}"
    what = f"{row['format']:10} load {row['load_s']:.1f} s  prompt {row['prompt']:8.0f} tok/s"
    rate = f"decode {row['decode']:7.1f} tok/s = {row['gbytes']:6.0f} GB/s"
    batches = [f"{k} {v:.0f} tok/s" for k, v in row.items() if k.startswith("batch")]
    lines = ["  ".join([what, rate, f"{row['of_copy']:.1%} of a copy", *batches])]
    table = row.get("kernels", {})
    if "rows" in table:
        busy = f"kernels {table['busy_us']:.0f}, between {table['gap_us']:.0f}"
        lines.append(f"  a token {table['token_us']:.0f} us, {busy}")
        for r in table["rows"][:12]:
            lines.append(f"  {r['us']:8.1f} us {r['launches']:6.1f} x {r['kernel']}")
    if "long" in row:
        lines.append(f"  long context: {row['long']}")
    return "\n".join(lines)
