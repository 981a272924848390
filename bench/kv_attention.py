"""One layer's attention over a long cache: quantized pages beside bf16 and torch, in one run.

    python bench/kv_attention.py [--kv PRESETS] [--context 1k,4k,...] [--out STEM]

The model's shape: 16 query heads, 2 key heads, d = 256. Every contender appends the same tokens to
the same cache contents and attends; "error" is against f32 sdpa, so none does less work. Caches are
copies that together exceed the last-level cache, taken in turn. Contenders alternate in rounds, and
the fastest call counts. Our bf16 attention also norms, turns and gates; it is charged for that.
"sdpa" has enable_gqa, "sdpa grouped" the heads of a key head as more queries of it instead.

Floor: the larger of (bytes of the cache over the read bandwidth) and (operations over the rate of
torch's matmul here, of one thread, times threads: f32, or bf16 for bf16 sdpa, or int8 for codecs
``h*``, whose products with values count twice: their weights have 14 bits).
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from hadamoe import _cpu, bench, ops
from hadamoe.kv import PAGE, KVFormat, formats_of
from hadamoe.kv_ops import KVLayer, kv_attend, kv_encode

HEADS, KV_HEADS, D = 16, 2, 256
GROUP = HEADS // KV_HEADS
OURS = "hk8v8,hk8v4,hk4v4,hk4v3,hk4v2"
UNIQUE = 16  # pages of random numbers, repeated
OPEN = PAGE // 2  # tokens missing in the newest page of a decode


@dataclass
class Contender:
    """One way to attend.

    Attributes:
        calls: one per copy of the cache. nbytes: of the cache that a call reads.
        operations: of a call, in numbers of this kind.
        times: fastest and median call of each round. best: of all.
        commit: seconds to store a full page, every 64 tokens.
    """

    name: str
    calls: list[Callable[[], torch.Tensor]]
    nbytes: int
    operations: float
    kind: str
    times: list[tuple[float, float]] = field(default_factory=list)
    commit: float | None = None

    @property
    def best(self) -> float:
        return min(self.times)[0]

    def floor(self, read: float, rates: dict[str, float]) -> float:
        """Seconds that a call takes at least at these bytes and operations a second."""
        return max(self.nbytes / read, self.operations / rates[self.kind])


class Contents:
    """Rows of every cache: the same for all. Keys have an rms of 1, as behind the model's norm."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        rows = rng.standard_normal((2, KV_HEADS, UNIQUE, PAGE, D), np.float32)
        rows[0] /= np.sqrt((rows[0] ** 2).mean(-1, keepdims=True))
        self.rows = torch.from_numpy(rows).bfloat16().float()  # what a raw page keeps exactly
        q = torch.from_numpy(rng.standard_normal((1, 512, HEADS, D), np.float32))
        self.q = q / q.square().mean(-1, keepdim=True).sqrt()

    def tokens(self, begin: int, end: int) -> torch.Tensor:
        """Keys and values f32 [2, g, end - begin, d]."""
        index = torch.arange(begin, end) % (UNIQUE * PAGE)
        return self.rows.flatten(2, 3)[:, :, index]

    def pages(self, codec: str, side: int, count: int) -> torch.Tensor:
        """u8 [count, g, bytes]: pages 1.. of a sequence."""
        names = ("key", "value")
        unique = [kv_encode(head.numpy(), codec, side=names[side]) for head in self.rows[side]]
        unique = np.roll(np.stack(unique, 1), -1, 0)  # page 0 stays raw
        return torch.from_numpy(np.resize(unique, (count, *unique.shape[1:])))


def copies(nbytes: int, pool: int) -> int:
    return max(1, -(-pool // nbytes))


class Caches:
    """The copies of every contender's cache with room for some tokens."""

    def __init__(self, contents: Contents, room: int, formats: dict[str, KVFormat], pool: int):
        self.contents, self.room, self.table = contents, room, None
        both = contents.tokens(0, room)[:, None]
        plain = 2 * KV_HEADS * room * D
        bf16 = both.bfloat16()
        self.bf16 = [tuple(bf16.clone()) for _ in range(copies(2 * plain, pool))]
        self.f32 = [tuple(both.clone()) for _ in range(copies(4 * plain, pool))]
        self.pages = {}
        for name, kind in formats.items():
            stored = [contents.pages(c, i, room // PAGE - 1) for i, c in enumerate(kind)]
            count = copies(sum(s.nbytes for s in stored), pool)
            self.pages[name] = kind, [[s.clone() for s in stored] for _ in range(count)]

    def layers(self, name: str, length: int) -> Iterator[KVLayer]:
        """A preset's copies with ``length`` tokens in each."""
        kind, stored = self.pages[name]
        newest = (length - 1) // PAGE
        table = np.arange(-1, self.room // PAGE - 1, dtype=np.int32)[None]
        for pages in stored:
            raw = torch.zeros(2, 1, KV_HEADS, 3, PAGE, D, dtype=torch.bfloat16)
            for slot, page in ((0, 0), *((1 + p % 2, p) for p in (newest - 1, newest) if p >= 0)):
                raw[:, 0, :, slot] = self.contents.tokens(page * PAGE, (page + 1) * PAGE)
            yield KVLayer(kind, *raw, *pages, table)


def ours_bf16(caches: Caches, q, k, v, past: int) -> list[Callable[[], torch.Tensor]]:
    """The op that the unquantized model runs, its gate open and its positions 0."""
    tokens = q.shape[1]
    gate = torch.full_like(q, 40.0)
    proj = torch.cat([torch.cat([q, gate], -1).flatten(2), k.flatten(2), v.flatten(2)], -1)
    one, turn = torch.ones(D), (torch.ones(1, tokens, 64), torch.zeros(1, tokens, 64))
    y = torch.empty(1, tokens, HEADS * D)

    def call(states) -> torch.Tensor:
        inputs = [proj, one, one, *turn, None]
        _cpu.call("attention", inputs, [y, *states], [HEADS, past], [1e-6])
        return y.view(q.shape)

    return [lambda s=s: call(s) for s in caches.bf16]


def torch_sdpa(pairs, q, length: int, grouped: bool = False) -> list[Callable[[], torch.Tensor]]:
    """sdpa on the first ``length`` tokens; grouped: heads of a key head as more queries of it."""
    dtype, tokens = pairs[0][0].dtype, q.shape[1]
    x = q.transpose(1, 2).to(dtype)  # [1, h, t, d]
    mask = None
    if tokens > 1:
        seen = torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens)
        mask = torch.zeros(tokens, length).masked_fill_(~seen, -torch.inf).to(dtype)
    if grouped:
        x = x.reshape(1, KV_HEADS, GROUP * tokens, D)
        mask = None if mask is None else mask.repeat(GROUP, 1)
    x = x.contiguous()

    def call(pair) -> torch.Tensor:
        keys, values = (s[:, :, :length] for s in pair)
        y = sdpa(x, keys, values, attn_mask=mask, enable_gqa=not grouped)
        return y.reshape(1, HEADS, tokens, D).transpose(1, 2)

    return [lambda p=p: call(p) for p in pairs]


def full_page(caches: Caches, name: str, pages: int) -> Callable[[], object]:
    """Appends the last token of a page, which is stored with that."""
    layer, end = next(caches.layers(name, pages * PAGE)), pages * PAGE
    k, v = caches.contents.tokens(end - 1, end).transpose(1, 2)[:, None].contiguous()
    return lambda: kv_attend(None, k, v, layer, np.int64([end - 1]))


def cell(caches: Caches, tokens: int, past: int) -> list[Contender]:
    """Every contender for some new tokens behind ``past``."""
    length, q = past + tokens, caches.contents.q[:, :tokens].contiguous()
    k, v = caches.contents.tokens(past, length).transpose(1, 2)[:, None].contiguous()
    flops = 4.0 * HEADS * D * sum(range(past + 1, length + 1))
    plain, at = 2 * KV_HEADS * length * D, np.int64([past])
    found = [
        Contender("bf16", ours_bf16(caches, q, k, v, past), 2 * plain, flops, "f32"),
        Contender("sdpa f32", torch_sdpa(caches.f32, q, length), 4 * plain, flops, "f32"),
        Contender("sdpa bf16", torch_sdpa(caches.bf16, q, length), 2 * plain, flops, "bf16"),
    ]
    if tokens <= 8:  # the mask of a prompt would be 8 times as large, too
        calls = torch_sdpa(caches.bf16, q, length, grouped=True)
        found.append(Contender("sdpa grouped", calls, 2 * plain, flops, "bf16"))
    for name, (kind, stored) in caches.pages.items():
        page = sum(s[0].nbytes for s in stored[0])
        coded = max(0, past // PAGE - 1)
        nbytes = page * coded + 4 * KV_HEADS * D * (length - coded * PAGE)
        integer = all(c.startswith("h") for c in kind)
        work, rate = (1.5 * flops, "int8") if integer else (flops, "f32")
        calls = [
            lambda layer=layer: kv_attend(q, k, v, layer, at)
            for layer in caches.layers(name, length)
        ]
        found.append(Contender(name, calls, nbytes, work, rate))
        found[-1].commit = bench.fastest(full_page(caches, name, past // PAGE), 0.01)
    return found


def measure(contenders: list[Contender], rounds: int, budget: float) -> None:
    clock = time.perf_counter
    for _ in range(rounds):
        for c in contenders:
            time.sleep(0.01)  # torch's threads go on spinning for a while
            c.calls[-1]()
            times, end = [], clock() + budget
            while not times or clock() < end:
                for call in c.calls:
                    begin = clock()
                    call()
                    times.append(clock() - begin)
            c.times.append((min(times), statistics.median(times)))


def matmul_rates(least: dict[str, float], threads: int) -> dict[str, float]:
    """Operations a second of torch's matrix products: those of one thread, the most seen so far,
    times threads."""
    n = 1024
    x = torch.randn(n, n)
    y, i = x.bfloat16(), (x * 40).to(torch.int8)
    calls = {"f32": lambda: x @ x, "bf16": lambda: y @ y, "int8": lambda: torch._int_mm(i, i)}
    torch.set_num_threads(1)
    rates = {
        t: max(least.get(t, 0), threads * 2 * n**3 / bench.fastest(f, 0.1))
        for t, f in calls.items()
    }
    torch.set_num_threads(threads)
    return rates


def rows_of(
    contenders: list[Contender], context: int, tokens: int, read: float, rates: dict[str, float]
) -> list[dict]:
    truth = next(c for c in contenders if c.name == "sdpa f32").calls[0]().clone()
    best = {c.name: c.best for c in contenders}
    theirs = min(t for name, t in best.items() if name.startswith("sdpa"))
    rows = []
    for c in contenders:
        off = c.calls[0]().float() - truth
        rows.append({
            "context": context, "tokens": tokens, "cache": c.name, "MB": c.nbytes / 1e6,
            "ms": 1e3 * c.best, "GB/s": c.nbytes / c.best / 1e9,
            "of read": c.nbytes / c.best / read,
            "over floor": c.best / c.floor(read, rates), "x bf16": best["bf16"] / c.best,
            "x sdpa bf16": best["sdpa bf16"] / c.best, "x best sdpa": theirs / c.best,
            "error": float(off.norm() / truth.norm()),
            "commit us": None if c.commit is None else 1e6 * c.commit,
            "median ms": 1e3 * min(median for _, median in c.times), "read GB/s": read / 1e9,
        })  # fmt: skip
    return rows


HEAD = ("cache", "MB", "ms", "GB/s", "of read", "over floor", "x bf16", "x sdpa bf16",
        "x best sdpa", "error", "commit us")  # fmt: skip


def lines_of(rows: list[dict]) -> Iterator[str]:
    r = rows[0]
    yield f"\ncontext {r['context']}, {r['tokens']} tokens, reading {r['read GB/s']:.1f} GB/s"
    yield f"{HEAD[0]:14}" + "".join(f"{name:>12}" for name in HEAD[1:])
    for r in rows:
        texts = [
            f"{r['MB']:.2f}", f"{r['ms']:.3f}", f"{r['GB/s']:.1f}", f"{r['of read']:.0%}",
            *(f"{r[name]:.2f}" for name in HEAD[5:9]), f"{r['error']:.1e}",
            "" if r["commit us"] is None else f"{r['commit us']:.0f}",
        ]  # fmt: skip
        yield f"{r['cache']:14}" + "".join(f"{text:>12}" for text in texts)


def size(text: str) -> int:
    """4k: 4096."""
    return int(text[:-1]) * 1024 if text[-1] in "kK" else int(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = lambda text: [size(t) for t in text.split(",") if t]  # noqa: E731
    parser.add_argument("--kv", default=OURS, help="presets, or KEY/VALUE codecs")
    parser.add_argument("--context", type=sizes, default="1k,4k,16k,32k,128k")
    parser.add_argument("--tokens", type=sizes, default="1,4,8", help="new ones in a call")
    parser.add_argument("--chunk", type=int, default=512, help="of a prompt")
    parser.add_argument("--prefill", type=sizes, default="4k,32k", help="contexts before a chunk")
    parser.add_argument("--threads", type=int, default=ops.threads())
    parser.add_argument(
        "--pool", type=int, default=160, help="MB of caches taken in turn, at least"
    )
    parser.add_argument("--rounds", type=int, default=5, help="a chunk takes half as many")
    parser.add_argument("--seconds", type=float, default=0.03, help="of a contender in a round")
    parser.add_argument("--out", type=Path, help="stem of a .txt and a .json to write")
    args = parser.parse_args()
    for n in (*args.context, *args.prefill, args.chunk):
        if n % PAGE or n < 2 * PAGE or args.chunk > 512:
            parser.error(
                f"{n}: needs a multiple of {PAGE} from {2 * PAGE} on; a chunk has 512 at most"
            )
    if max(args.tokens) > OPEN:
        parser.error(f"--tokens: needs {OPEN} at most")
    return args


def main() -> None:
    args = arguments()
    ops.set_threads(args.threads)
    torch.set_num_threads(args.threads)
    names = [name for name in args.kv.split(",") if name]
    formats = {n + " pages" * (n == "bf16"): formats_of(n, 1)[0] for n in names}
    contents, rates = Contents(), {}
    machine = bench.machine() | {
        "command": shlex.join(["python", "bench/kv_attention.py", *sys.argv[1:]])
    }
    report, lines = {"machine": machine, "rows": []}, [json.dumps(machine)]
    print(lines[0])
    for context in sorted({*args.context, *args.prefill}):
        chunk = [args.chunk] if context in args.prefill else []
        caches = Caches(contents, context + sum(chunk), formats, args.pool << 20)
        for tokens in [*(args.tokens if context in args.context else []), *chunk]:
            decode = tokens <= OPEN
            past = context - OPEN - tokens if decode else context
            contenders = cell(caches, tokens, past)
            read = bench.read_bandwidth(args.threads, 1 << 28, 0.1)
            rounds = args.rounds if decode else -(-args.rounds // 2)
            measure(contenders, rounds, args.seconds)
            rates = matmul_rates(rates, args.threads)
            read = max(read, bench.read_bandwidth(args.threads, 1 << 28, 0.1)) * 1e9
            rows = rows_of(contenders, context, tokens, read, rates)
            report["rows"] += rows
            for line in lines_of(rows):
                lines.append(line)
                print(line, flush=True)
        del caches, contenders
    report["matmul GFLOP/s"] = {t: round(v / 1e9, 1) for t, v in rates.items()}
    lines.append(f"\ntorch's matmul, GFLOP/s: {report['matmul GFLOP/s']}")
    print(lines[-1])
    if args.out:
        args.out.with_suffix(".txt").write_text("\n".join(lines) + "\n")
        args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
