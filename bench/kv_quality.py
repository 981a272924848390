"""What each preset of the KV cache costs in quality: two small models against their bf16 cache.

    python bench/kv_quality.py [OUT] [--asks 64] [--segments 16]     writes OUT.json, .png, .txt

Text: the same bytes of held-out text after contexts of several lengths, teacher-forced through the
model of examples/checkpoints/stdlib_bf16: KL(bf16 cache || preset), share of equal top-1 tokens,
bits per byte. Recall: the model of `passkey_train.py` is asked for values it saw in the first half
of its context.

A query sees the first page and its own as they are, so `coded` says how much of the rest is there.
Every preset has the same pages, other software's codecs too: it is codecs that are compared.
"""

from __future__ import annotations

import argparse
import json
import math
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from passkey_train import KEY, VALUE, records

import hadamoe
from hadamoe import bench, ops
from hadamoe.kv import PAGE, PRESETS, formats_of, page_bytes

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "examples" / "checkpoints" / "stdlib_bf16"
RECALL = ROOT / "tests" / "golden" / "checkpoints" / "passkey.tar.xz"
SCORED = 128  # bytes at the end of each segment
ASKED = 8  # values at the end of each text of records
LENGTHS = {"text": (256, 1024, 4096), "recall": (512, 1024, 2048, 4096)}
COLUMNS = ("kl", "top1", "bits"), ("kl", "exact", "p")
_FORM = {"kl": "9.1e", "top1": "9.4f", "bits": "9.4f", "exact": "9.3f", "p": "9.3f"}


def segments(data: bytes, length: int, count: int) -> torch.Tensor:
    """ids i64 ``[count, length]`` that end at the same places whatever the length."""
    longest = max(LENGTHS["text"])
    ends = np.linspace(longest, len(data), count).astype(int)
    return torch.tensor([list(data[e - length : e]) for e in ends])


def recall(length: int, count: int) -> torch.Tensor:
    """ids i64 ``[count, length]``: records, then ASKED of the first half again, none of page 0."""
    rng, rows = np.random.default_rng(length), []
    width = len(records(rng, 1)[0])
    for _ in range(count):
        known = records(rng, length // width - ASKED)
        first, last = -(-PAGE // width), len(known) // 2
        asked = known[rng.choice(np.arange(first, last), ASKED, replace=False)]
        row = np.concatenate([known, asked]).reshape(-1)
        rows.append(np.pad(row, (length - len(row), 0), constant_values=ord(";")))
    return torch.tensor(np.stack(rows).astype(np.int64))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, scored: int, batch: int = 4) -> torch.Tensor:
    """f64 log-probabilities ``[n, scored, vocabulary]`` that predict the last ids of each row."""
    rows = [model(input_ids=x, logits_to_keep=scored + 1).logits[:, :-1] for x in ids.split(batch)]
    return torch.cat(rows).double().log_softmax(-1)


def divergence(want: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """KL in nats of each prediction."""
    return (want.exp() * (want - got)).sum(-1)


def coded_share(length: int, scored: int) -> float:
    """Share of the tokens a scored query sees that it sees as stored."""
    at = np.arange(length - scored, length)
    return float(np.mean(np.maximum(at // PAGE - 1, 0) * PAGE / (at + 1)))


def text_figures(want: torch.Tensor, got: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    """Of the last SCORED bytes of each segment."""
    taken = got.gather(-1, ids[:, -SCORED:, None])
    return {
        "kl": divergence(want, got).mean().item(),
        "top1": (want.argmax(-1) == got.argmax(-1)).double().mean().item(),
        "bits": -taken.mean().item() / math.log(2),
        "coded": coded_share(ids.shape[1], SCORED),
    }


def recall_figures(want: torch.Tensor, got: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    """Of the characters of asked values. A value is right where every character is likeliest."""
    width = got.shape[1] // ASKED
    span = slice(KEY + 1, KEY + 1 + VALUE)

    def values(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (ASKED, width))[:, :, span]

    answer, got, want = values(ids[:, -ASKED * width :]), values(got), values(want)
    taken = got.gather(-1, answer[..., None])[..., 0].sum(-1).exp()
    return {
        "kl": divergence(want, got).mean().item(),
        "exact": (got.argmax(-1) == answer).all(-1).double().mean().item(),
        "p": taken.mean().item(),
        "coded": coded_share(ids.shape[1], ASKED * width),
    }


def token_bytes(config: Any, kv: str) -> float:
    """Bytes a cached token takes, all attention layers."""
    layers = config.layer_types.count("full_attention")
    sides = (page_bytes(c, config.head_dim) for f in formats_of(kv, layers) for c in f)
    return config.num_key_value_heads * sum(sides) / PAGE


def measure(path: Path, texts: dict[int, torch.Tensor], scored: int, figures: Any) -> list[dict]:
    """A row per preset: name, bytes per token, figures by length; the first is the bf16 cache."""
    rows, want = [], {}
    for kv in PRESETS:
        model, _ = hadamoe.load(path, vision=False, kv=kv)
        row: dict[str, Any] = {"kv": kv, "bytes": token_bytes(model.config.get_text_config(), kv)}
        for length, ids in texts.items():
            got = logits(model, ids, scored)
            row[str(length)] = figures(want.setdefault(length, got), got, ids)
        rows.append(row)
        print(kv, flush=True)
    return rows


def table(title: str, rows: list[dict], columns: tuple[str, ...]) -> str:
    """Text: a line per preset, a group of columns per length."""
    lengths = [k for k in rows[0] if k.isdigit()]
    heads = [f"{n} tokens, {rows[0][n]['coded']:.0%} coded" for n in lengths]
    lines = [title, " " * 16 + " | ".join(f"{h:^{9 * len(columns)}}" for h in heads)]
    names = "".join(f"{c:>9}" for c in columns)
    lines.append(f"{'kv':<9}{'B/token':>7}" + " | ".join(names for _ in lengths))
    for row in rows:
        groups = ("".join(f"{row[n][c]:{_FORM[c]}}" for c in columns) for n in lengths)
        lines.append(f"{row['kv']:<9}{row['bytes']:>7.0f}" + " | ".join(groups))
    return "\n".join(lines)


def plot(path: Path, results: dict[str, list[dict]]) -> None:
    """KL over bytes per token at the longest context, one panel per model (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(11, 5))
    for axes, (name, rows) in zip(panels, results.items(), strict=True):
        longest = [k for k in rows[0] if k.isdigit()][-1]
        for ours, marker, label in ((True, "o", "hadamoe's"), (False, "s", "other software's")):
            chosen = [r for r in rows if r["kv"] != "bf16"]
            chosen = [r for r in chosen if r["kv"].startswith("hk") == ours]
            points = [(r["bytes"], r[longest]["kl"]) for r in chosen]
            axes.semilogy(*zip(*points, strict=True), marker, ms=7, label=label)
            for r, point in zip(chosen, points, strict=True):
                axes.annotate(r["kv"], point, xytext=(5, 4), textcoords="offset points", fontsize=8)
        axes.set(xlabel="bytes per token", ylabel="mean KL to the bf16 cache, nats")
        axes.set_title(f"{name}, {longest} tokens of context", fontsize=10)
        axes.grid(True, which="both", alpha=0.2)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "bench/results/kv_quality")
    parser.add_argument("--segments", type=int, default=16)
    parser.add_argument("--asks", type=int, default=64)
    args = parser.parse_args()
    start, results = time.monotonic(), {}
    torch.set_num_threads(1)
    data = (TEXT / "heldout.txt").read_bytes()
    texts = {n: segments(data, n, args.segments) for n in LENGTHS["text"]}
    results["text"] = measure(TEXT, texts, SCORED, text_figures)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(RECALL) as archive:
            archive.extractall(folder, filter="data")
        texts = {n: recall(n, args.asks // ASKED) for n in LENGTHS["recall"]}
        width = KEY + VALUE + 2
        path = Path(folder) / "passkey"
        results["recall"] = measure(path, texts, ASKED * width, recall_figures)
    titles = (
        f"held-out text, {args.segments * SCORED} bytes scored at each length",
        f"recall, {args.asks} values of {VALUE} characters asked at each length",
    )
    tables = map(table, titles, results.values(), COLUMNS)
    report = (
        "\n\n".join(tables) + f"\n\n{time.monotonic() - start:.0f} s, {ops.threads()} threads\n"
    )
    print(report)
    args.out.with_suffix(".txt").write_text(report)
    machine = bench.machine() | {"command": "python bench/kv_quality.py"}
    args.out.with_suffix(".json").write_text(
        json.dumps({"machine": machine, **results}, indent=1) + "\n"
    )
    plot(args.out.with_suffix(".png"), results)


if __name__ == "__main__":
    main()
