"""The bench command: what it measures, in which order, and how it prints."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from . import ops, terminal
from .cli_options import Device, Resident, Rope, Threads, existing, set_threads
from .errors import ContractError

Context = Annotated[
    str | None,
    typer.Option(
        help="Also decode after so many tokens, such as 4k,32k,128k, with each format of --kv. "
        "Keys and values are synthetic: no prompt of that length is run."
    ),
]
Formats = Annotated[str, typer.Option(help="Formats of the KV cache that --context compares.")]


def bench(
    directory: Annotated[
        Path | None, typer.Argument(help="A checkpoint to run as a whole.", show_default=False)
    ] = None,
    threads: Threads = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every figure here.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a roofline plot (PNG) here.")] = None,
    seconds: Annotated[float, typer.Option(help="Spent on each measurement.", min=0.01)] = 0.3,
    pool: Annotated[int, typer.Option(help="MB of weights each measurement reads.", min=1)] = 512,
    prompt_tokens: Annotated[int, typer.Option(help="Of the model's prefill.", min=1)] = 256,
    new_tokens: Annotated[int, typer.Option(help="Of the model's decode.", min=2)] = 32,
    repeats: Annotated[int, typer.Option(help="Runs of the model; medians count.", min=1)] = 3,
    context: Context = None,
    kv: Formats = "bf16,hk8v8,hk8v4,hk4v4,hk4v3,hk4v2",
    rope: Rope = None,
    device: Device = "cpu",
    resident: Resident = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Take a decoded token's time apart.")
    ] = False,
    instances: Annotated[bool, typer.Option(help="Measure the kernel instances.")] = True,
) -> None:
    """Measure read bandwidth, every kernel instance, and the prefill and decode of a checkpoint."""
    set_threads(threads)
    if directory:
        existing(directory)
    elif profile or resident or rope or context:
        raise ContractError(
            "bench: --profile, --resident, --rope and --context need a checkpoint directory"
        )
    _check_device(device, profile, context)
    names = kv.split(",")
    sizes = _sizes(context, names, new_tokens) if context else []
    _check_outputs(json_file, plot)
    from . import bench as measure

    console = terminal.console()
    counts = sorted({1, ops.threads()})
    bandwidth = {n: measure.read_bandwidth(n) for n in counts}
    for n, rate in bandwidth.items():
        console.print(f"read bandwidth, {n} thread{'s' * (n > 1)}: {rate:.1f} GB/s")
    limit, rows, model, parts = bandwidth[ops.threads()], [], None, None
    prefills, contexts = [], []
    if instances:
        with console.status("") as status:
            rows = measure.instances(
                limit, budget=seconds, pool_bytes=pool << 20, progress=status.update
            )
        _show_instances(console, rows)
    if directory:
        from . import torch_bench as whole

        opened = _open(directory, rope=rope, device=device, resident=resident)
        if device != "cpu":
            limit = whole.copy_bandwidth(opened.model.device)
            console.print(f"copies on {device}: {limit:.1f} GB/s read and written")
        model, parts = whole.model(
            opened, limit, prompt_tokens, new_tokens, repeats=repeats, profiled=profile
        )
        table = terminal.table(str(directory), "figure", "value")
        for name, value in model.items():
            table.add_row(name, value if isinstance(value, str) else f"{value:,.6g}")
        console.print(table)
    if parts:
        _show_profile(console, parts, limit)
    if sizes:
        with console.status("") as status:
            shared = {"repeats": repeats, "progress": status.update}
            contexts = whole.contexts(opened, limit, names, sizes, new_tokens, **shared)
            prefills = whole.prefills(opened, names, prompt_tokens, **shared)
        _show_contexts(console, prefills, contexts)
    if json_file:
        report = measure.report(bandwidth, rows, model, parts, prefills, contexts)
        json_file.write_text(json.dumps(report, indent=2) + "\n")
        console.print(f"wrote {json_file}")
    if plot:
        measure.plot(plot, limit, rows)
        console.print(f"wrote {plot}")


def _open(directory: Path, **how: Any) -> Any:
    from . import torch_bench

    with terminal.bar(terminal.console(stderr=True)) as progress:
        return torch_bench.load(directory, progress=progress, **how)


def _check_device(device: str, profile: bool, context: str | None) -> None:
    if device != "cpu" and (profile or context):
        raise ContractError(f"bench: --profile and --context are not there for --device {device}")


def _check_outputs(json_file: Path | None, plot: Path | None) -> None:
    """Before minutes of measuring, not after."""
    for out in filter(None, (json_file, plot)):
        if not out.parent.is_dir():
            raise ContractError(f"bench: {out.parent} is not a directory, cannot write {out.name}")
    if plot and find_spec("matplotlib") is None:
        raise ModuleNotFoundError("no matplotlib", name="matplotlib")


def _sizes(text: str, kv: list[str], new_tokens: int) -> list[int]:
    """4k,32k as numbers; ContractError, before anything is measured, for what cannot be."""
    sizes = []
    for part in text.split(","):
        if not (found := re.fullmatch(r"(\d{1,7})(k?)", part.strip().lower())):
            raise ContractError(f"bench: --context has {part!r}, needs numbers such as 4k or 4096")
        sizes.append(int(found[1]) * (1024 if found[2] else 1))
    from . import torch_bench

    torch_bench.check(kv, sizes, new_tokens)
    return sizes


def _show_contexts(console: Any, prefills: list[Any], contexts: list[Any]) -> None:
    first = prefills[0].kv
    title = f"a prompt of {prefills[0].prompt_tokens:,} tokens"
    table = terminal.table(title, "kv", "seconds", "tok/s", f"of {first}")
    for r in prefills:
        rate = f"{r.prompt_tokens / r.seconds:.1f}"
        table.add_row(r.kv, f"{r.seconds:.3f}", rate, f"{prefills[0].seconds / r.seconds:.2f}x")
    console.print(table)
    columns = ("cache MB", "smaller", "ms/token", "tok/s", "best ms", "faster", "over floor")
    table = terminal.table("decoding after a synthetic context", "context", "kv", *columns, left=2)
    base = {r.context: r for r in contexts if r.kv == first}
    for r in contexts:
        b = base[r.context]
        table.add_row(
            f"{r.context:,}", r.kv, f"{r.cache_bytes / 1e6:,.1f}",
            f"{b.cache_bytes / r.cache_bytes:.2f}x", f"{r.seconds * 1e3:.2f}",
            f"{1 / r.seconds:.2f}", f"{r.best * 1e3:.2f}", f"{b.seconds / r.seconds:.2f}x",
            f"{r.seconds / r.floor:.2f}",
        )  # fmt: skip
    console.print(table)
    console.print(f"smaller, faster and of: beside {first}, measured in turn")


def _show_instances(console: Any, rows: list[Any]) -> None:
    title = f"one token, {ops.isa()}, {ops.threads()} threads"
    table = terminal.table(title, "instance", "what", "rows", "GB/s", "of the limit", left=2)
    for r in rows:
        share = f"{100 * r.fraction:.0f} %"
        table.add_row(r.instance, r.what, f"{r.rows} x {r.columns}", f"{r.gbytes:.1f}", share)
    console.print(table)


def _show_profile(console: Any, p: Any, limit: float) -> None:
    """A line per kind of module and op, then the sums."""
    columns = (
        "calls",
        "ms",
        "of the token",
        "products ms",
        "rest ms",
        "MB",
        "GB/s",
        "of the limit",
    )
    title = f"a decoded token, mean of {p.tokens}"
    table = terminal.table(title, "in", "op", *columns, left=2)

    def row(*names: str, calls: str, seconds: float, products: float, nbytes: float) -> None:
        rate = nbytes / products / 1e9 if products else 0.0
        rates = (f"{products * 1e3:.3f}", f"{(seconds - products) * 1e3:.3f}")
        reading = (f"{nbytes / 1e6:,.1f}", f"{rate:.1f}", f"{rate / limit:.0%}")
        share = f"{seconds / p.seconds:.1%}"
        reading = reading if rate else ()
        table.add_row(*names, calls, f"{seconds * 1e3:.3f}", share, *rates, *reading)

    for x in p.lines:
        row(x.kind, x.op, calls=f"{x.calls:g}", seconds=x.seconds, products=x.product_seconds,
            nbytes=x.nbytes)  # fmt: skip
    row("torch and Python", "", calls="", seconds=p.python_seconds, products=0.0, nbytes=0.0)
    calls = f"{sum(x.calls for x in p.lines):g}"
    row("in all", "", calls=calls, seconds=p.seconds, products=p.product_seconds, nbytes=p.nbytes)
    console.print(table)
    outside = p.seconds - p.product_seconds
    console.print(
        f"outside products with weights: {outside * 1e3:.2f} ms of {p.seconds * 1e3:.2f} ms, "
        f"{outside / p.seconds:.1%}"
    )
