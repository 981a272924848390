"""Kernels on an NVIDIA GPU beside a copy: what bench/gpu.py measures of single ops."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from steps import attempt

from hadamoe import Weight, bench, gpu_calls, ops, torch_cuda

DEVICE = torch.device("cuda", 0)
EXPERTS = 8
#: (rows, columns) of products; the head is the model's own.
SHAPES = {**bench.SHAPES, "head": (248320, 2048)}
#: What prompts are measured with.
PROMPT_TOKENS = (512, 4096)
#: Gated DeltaNet: its layers, (key, value) heads and their sizes, and sequences decoded together.
LAYERS, HEADS, HEAD_DIMS, BATCHES = 30, (16, 32), (128, 128), (1, 8, 32, 64)
#: fast-hadamard-transform's published time over a copy's, up to 8192 columns (A100).
PUBLISHED_HADAMARD = 1.0


class Clock:
    """When the time of a report is over."""

    def __init__(self, minutes: float, spent: float) -> None:
        self._end = time.monotonic() + 60 * minutes - spent

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()


def seconds(call: Callable[[], Any], repeats: int = 10) -> float:
    """The median of a captured call's replays."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def copy_rate(nbytes: int) -> float:
    """1e9 bytes a second, read and written, of a copy too large for any cache."""
    x = torch.empty(nbytes // 4, device=DEVICE).normal_()
    y = torch.empty_like(x)
    return 2 * nbytes / seconds(lambda: y.copy_(x)) / 1e9


def products(copy: float, pool_bytes: int, clock: Clock) -> Iterator[dict[str, Any]]:
    """1, 4 and 8 tokens through each instance."""
    for instance in ops.instances():
        for what, (rows, columns) in SHAPES.items():
            if clock.left < 0:
                yield {"instance": str(instance), "what": what, "left_out": "no time"}
                continue
            row = attempt(lambda a=(instance, what, rows, columns): product(*a, pool_bytes))
            if "gbytes" in row:
                row["of_copy"] = row["gbytes"] / copy
            yield {"instance": str(instance), "what": what, **row}
            torch.cuda.empty_cache()


def weights(
    instance: Any, what: str, rows: int, columns: int, pool_bytes: int
) -> tuple[list[tuple[Any, Any]], int]:
    """(a resident weight, experts or None) of each call, and bytes of one call's codes, scales and
    biases for one token."""
    front = torch_cuda.front(DEVICE)
    pool = bench.Pool(instance, rows, columns, pool_bytes, least=1 if what == "head" else EXPERTS)
    parts = [pool.part(i) for i in range(pool.matrices)]
    if what != "experts":
        packed = [ops.pack(Weight(columns, ((part,),))) for part in parts]
        return [(gpu_calls.resident(front, w), None) for w in packed], parts[0].nbytes
    count = min(256, len(parts)) // EXPERTS * EXPERTS
    stack = ops.pack(Weight(columns, tuple((part,) for part in parts[:count])))
    picks = np.random.default_rng(2).permutation(count).astype(np.int32).reshape(-1, 1, EXPERTS)
    return [(gpu_calls.resident(front, stack), front.array(p)) for p in picks], EXPERTS * parts[
        0
    ].nbytes


def product(instance: Any, what: str, rows: int, columns: int, pool_bytes: int) -> dict[str, Any]:
    """1e9 bytes a second of one token, and the time of 4 and 8 over it, through a pool of weights.
    Several tokens of experts have the same ones."""
    front = torch_cuda.front(DEVICE)
    calls, nbytes = weights(instance, what, rows, columns, pool_bytes)
    times = {}
    for tokens in (1, 4, 8):
        x = front.array(np.random.default_rng(1).standard_normal((tokens, columns), np.float32))

        def once(x: Any = x, tokens: int = tokens) -> None:
            for weight, e in calls:
                picks = None if e is None else e.expand(tokens, -1).contiguous()
                gpu_calls.product(front, x, weight, expert=picks)

        times[tokens] = seconds(once)
    return {
        "gbytes": nbytes * len(calls) / times[1] / 1e9,
        "us": times[1] / len(calls) * 1e6,
        "times_4": times[4] / times[1],
        "times_8": times[8] / times[1],
    }


def hadamards(copy: float) -> Iterator[dict[str, Any]]:
    """The rotation's time over that of copying as many bytes, in bf16 and f32."""
    front = torch_cuda.front(DEVICE)
    for columns, block in ((512, None), (2048, 128), (2048, None), (4096, 128), (8192, None)):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(1 << 28, device=DEVICE).to(dtype).view(-1, columns)
            took = seconds(
                lambda a=(x, block): gpu_calls.hadamard(
                    front, a[0], block=a[1], pre=None, post=None
                )
            )
            copied = 2 * x.numel() * x.element_size() / copy / 1e9
            yield {
                "columns": columns, "block": block, "dtype": str(dtype)[6:],
                "of_copy_time": took / copied, "published": PUBLISHED_HADAMARD,
            }  # fmt: skip


def prompts(clock: Clock) -> Iterator[dict[str, Any]]:
    """TFLOP/s of a dense product of a prompt, beside torch's bf16 matmul of the same shape."""
    front = torch_cuda.front(DEVICE)
    rows, columns = bench.SHAPES["dense"]
    for tokens in PROMPT_TOKENS:
        a = torch.randn(tokens, columns, device=DEVICE, dtype=torch.bfloat16)
        b = torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16)
        flops = 2 * tokens * rows * columns
        torch_rate = flops / seconds(lambda a=a, b=b: a @ b.T) / 1e12
        x = a.float()
        for instance in ops.instances():
            if clock.left < 0:
                yield {"instance": str(instance), "tokens": tokens, "left_out": "no time"}
                continue
            ((weight, _), *_), _ = weights(instance, "dense", rows, columns, 1)
            took = seconds(lambda x=x, w=weight: gpu_calls.product(front, x, w))
            rate = flops / took / 1e12
            yield {
                "instance": str(instance), "tokens": tokens, "tflops": rate,
                "torch_tflops": torch_rate, "of_torch": rate / torch_rate,
            }  # fmt: skip


def deltas(copy: float) -> Iterator[dict[str, Any]]:
    """A token of each of `LAYERS` gated delta layers in turn, whose states are more than the L2
    together; then one layer's prompts."""
    for batch in BATCHES:
        layers = [delta_arrays(batch, 1) for _ in range(LAYERS)]
        states = 2 * sum(layer[-1].nbytes for layer in layers)
        took = seconds(lambda layers=layers: [delta(layer) for layer in layers])
        rate = states / took / 1e9
        yield {
            "batch": batch, "tokens": 1, "us": took / LAYERS * 1e6,
            "gbytes": rate, "of_copy": rate / copy,
        }  # fmt: skip
    for tokens in PROMPT_TOKENS:
        layer = delta_arrays(1, tokens)
        took = seconds(lambda layer=layer: delta(layer))
        yield {"batch": 1, "tokens": tokens, "us": took * 1e6}


def delta_arrays(batch: int, tokens: int) -> list[torch.Tensor]:
    """proj, conv_weight, a_log, dt_bias, norm, conv_state and state of a layer."""
    (hk, hv), (dk, dv) = HEADS, HEAD_DIMS
    channels = 2 * hk * dk + hv * dv
    shapes = (
        (batch, tokens, channels + hv * dv + 2 * hv), (channels, 4), (hv,), (hv,), (dv,),
        (batch, channels, 4), (batch, hv, dk, dv),
    )  # fmt: skip
    return [0.1 * torch.randn(shape, device=DEVICE) for shape in shapes]


def delta(layer: list[torch.Tensor]) -> None:
    """A gated delta layer, its states in place."""
    front = torch_cuda.front(DEVICE)
    options = {"heads": HEADS, "head_dims": HEAD_DIMS, "eps": 1e-6}
    gpu_calls.gated_delta(front, *layer, **options, in_place=True)


def show_product(row: dict[str, Any]) -> str:
    """One line of the table of instances."""
    if "left_out" in row:
        return f"{row['instance']:20} {row['what']:8} left out: {row['left_out']}"
    return (
        f"{row['instance']:20} {row['what']:8} {row['us']:8.1f} us {row['gbytes']:7.0f} GB/s"
        f"  {row['of_copy']:6.1%}  4 tokens x{row['times_4']:.2f}  8 x{row['times_8']:.2f}"
    )


def show_hadamard(row: dict[str, Any]) -> str:
    """One line of the table of rotations."""
    what = f"hadamard {row['columns']:5} block {row['block'] or '2^n'!s:5} {row['dtype']:8}"
    return f"{what} x{row['of_copy_time']:.2f} of a copy"


def show_prompt(row: dict[str, Any]) -> str:
    """One line of the table of prompts."""
    if "left_out" in row:
        return f"{row['instance']:20} {row['tokens']:5} tokens left out: {row['left_out']}"
    what = f"{row['instance']:20} {row['tokens']:5} tokens"
    return f"{what} {row['tflops']:6.0f} TFLOP/s  {row['of_torch']:6.1%} of torch bf16"


def show_delta(row: dict[str, Any]) -> str:
    """One line of the table of gated delta layers."""
    what = f"gated delta batch {row['batch']:2} {row['tokens']:5} tokens {row['us']:8.1f} us"
    if "gbytes" not in row:
        return what
    return f"{what} {row['gbytes']:7.0f} GB/s of states {row['of_copy']:6.1%}"
