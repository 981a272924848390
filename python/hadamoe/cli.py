"""The commands: inspect, run, verify, synth, bench."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from . import cli_bench, ops, synth, terminal
from .cli_options import (
    KV,
    Device,
    Directory,
    Resident,
    Rope,
    Threads,
    existing,
    presets,
    set_threads,
)
from .errors import ContractError, DeviceError, FormatError, UnsupportedError

_ERRORS = (ContractError, FormatError, UnsupportedError, DeviceError, OSError)
_EXTRA = {"torch": "torch", "transformers": "torch", "tokenizers": "torch", "matplotlib": "cli"}


class _Commands(typer.core.TyperGroup):
    """Turns the package's own errors into one line and exit code 1."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except _ERRORS as e:
            _fail(terminal.printable(str(e)))
        except ModuleNotFoundError as e:
            if e.name not in _EXTRA:
                raise
            _fail(f"this needs {e.name}; install it with: pip install 'hadamoe[{_EXTRA[e.name]}]'")


def _fail(message: str) -> None:
    print(f"hadamoe: {message}", file=sys.stderr)
    raise typer.Exit(1)


app = typer.Typer(
    cls=_Commands,
    help="Qwen3.6-35B-A3B from its five published low-bit formats, on native kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command(name="inspect")
def inspect_command(
    directory: Directory,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    check: Annotated[bool, typer.Option(help="Also read every scale: none may be NaN.")] = False,
) -> None:
    """Say which format a directory is, why, what is stored how, and what running it takes."""
    from . import inspect

    found = inspect.describe(existing(directory), verify=check)
    missing = found.missing(ops.instances())
    if as_json:
        # Not through rich: it would break long lines.
        print(json.dumps({**found.as_dict(), "missing": [str(i) for i in missing]}, indent=2))
        return
    console = terminal.console()
    console.print(f"{found.path}: {found.format}")
    for line in found.evidence:
        console.print(f"  because {terminal.printable(line)}")
    console.print(
        f"  {found.layers} layers, {found.experts} experts ({found.top_k} a token), "
        f"hidden {found.hidden}; {found.tensors:,} tensors, {terminal.amount(found.file_bytes)}B"
    )
    columns = ("table", "bits", "group", "scale", "matrices", "weights", "MB", "MB/token")
    table = terminal.table("", "role", *columns, left=2)
    for r in found.rows:
        plain = r.instance.table == "plain"
        table.add_row(
            r.role + (" (rotated)" if r.rotated else ""),
            r.instance.scale if plain else r.instance.table,
            str(r.instance.bits),
            "" if r.group is None else str(r.group),
            "" if plain else r.instance.scale,
            f"{r.count:,}",
            f"{r.parameters:,}",
            f"{r.nbytes / 1e6:,.2f}",
            f"{r.token_bytes / 1e6:,.2f}",
        )
    console.print(table)
    console.print(
        f"text model: {terminal.amount(found.parameters)} weights, "
        f"{terminal.amount(found.nbytes)}B, {found.bits_per_weight:.3f} bits per weight"
    )
    console.print(f"read per decoded token: {terminal.amount(found.token_bytes)}B")
    if found.vision[0]:
        console.print(f"vision tower: {found.vision[0]} tensors, {found.vision[1] / 1e6:,.1f} MB")
    if found.mtp:
        console.print(f"MTP head: {found.mtp} tensors, not used")
    if found.kv_scales or found.kv_scales_ignored:
        bad = f"; not usable, 1 instead: {', '.join(found.kv_scales_ignored)}"
        bad = bad if found.kv_scales_ignored else ""
        console.print(f"KV cache scales: {found.kv_scales} usable{bad}")
    console.print(f"tokenizer: {'yes' if found.tokenizer else 'none'}")
    for note in found.notes:
        console.print(f"note: {terminal.printable(note)}")
    have = [str(i) for i in found.instances if i not in missing]
    console.print(f"kernels here ({ops.isa()}): {' '.join(have)}")
    if missing:
        console.print(f"LACKING here: {' '.join(map(str, missing))}")


@app.command()
def run(
    directory: Directory,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.", min=1)] = 128,
    temperature: Annotated[
        float, typer.Option(help="0: the likeliest token each time.", min=0)
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from this much of the probability.", min=1e-6, max=1)
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the chat template.")] = False,
    ignore_end: Annotated[bool, typer.Option(help="Go on after the end-of-text token.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Of activations: float32, bfloat16, float16.")
    ] = None,
    rope: Rope = None,
    kv: KV = "bf16",
    device: Device = "cpu",
    resident: Resident = False,
    threads: Threads = None,
) -> None:
    """Stream text from a prompt; speed and memory at the end."""
    set_threads(threads)
    existing(directory)
    from . import torch_model, torch_run  # their import is not part of opening

    start = time.perf_counter()
    with terminal.bar(terminal.console(stderr=True)) as progress:
        model, tokenizer = torch_model.load(
            directory, dtype=dtype, device=device, rope=rope, kv=presets(kv), resident=resident,
            progress=progress,
        )  # fmt: skip
    opened = time.perf_counter() - start

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    ids = torch_run.encode(tokenizer, prompt, chat)
    if not chat:
        show(prompt)
    result = torch_run.stream(
        model,
        tokenizer,
        ids,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=not ignore_end,
        on_text=show,
    )
    show("\n")
    where = torch_run.device_memory(model)
    memory = f", {where / 1e6:,.0f} MB on {device}" if where else ""
    kernels = f"{ops.isa()}, {ops.threads()} thread{'s' * (ops.threads() > 1)}"
    size = sum(f.stat().st_size for f in directory.glob("*.safetensors"))
    rate = f"{result.decode_rate:.1f} tok/s" if result.new_tokens > 1 else "-"
    lines = [
        f"opened     {opened:.2f} s",
        f"prefill    {result.prompt_tokens} tokens, {result.prefill_rate:.1f} tok/s",
        f"decode     {result.new_tokens} tokens, {rate}",
        f"cache      {result.kv}, {result.token_bytes:,} bytes per token, "
        f"{result.kv_bytes / 1e6:,.1f} MB held",
        f"memory     {torch_run.resident_bytes() / 1e6:,.0f} MB resident (with file pages)"
        + memory,
        f"files      {size / 1e6:,.0f} MB",
        f"kernels    {kernels if device == 'cpu' else device}",
    ]
    print("\n" + "\n".join(lines), file=sys.stderr)


@app.command(name="synth")
def synth_command(
    format: Annotated[
        str, typer.Argument(help=f"One of {', '.join(synth.FORMATS)}.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="Directory to create.", show_default=False)],
    layers: Annotated[int | None, typer.Option(help="Fewer (or more) layers.", min=1)] = None,
    shape: Annotated[str, typer.Option(help=f"Dimensions: {' or '.join(synth.PRESETS)}.")] = "full",
    vision: Annotated[bool, typer.Option(help="Add the vision tower.")] = False,
    mtp: Annotated[bool, typer.Option(help="The MTP head, where the format keeps it.")] = True,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    dry_run: Annotated[bool, typer.Option(help="Only say how large it would be.")] = False,
) -> None:
    """Write a full-shape synthetic checkpoint: real names, shapes and sizes, random codes."""
    if shape not in synth.PRESETS:
        raise ContractError(f"synth: shape={shape!r}, needs one of {', '.join(synth.PRESETS)}")
    options = {} if layers is None else {"layers": layers}
    plan = synth.plan(
        format, replace(synth.PRESETS[shape], **options), vision=vision, mtp=mtp, seed=seed
    )
    files, tensors = len(plan.shards()), len(plan.tensors) + len(plan.mtp)
    console = terminal.console()
    console.print(f"{format}: {plan.nbytes / 1e9:.3f} GB, {tensors:,} tensors in {files} files")
    if dry_run:
        return
    start = time.perf_counter()
    written = 0
    with terminal.bar(console) as show:

        def wrote(n: int) -> None:
            nonlocal written
            written += n
            show(written, plan.nbytes)

        path = plan.write(out, wrote)
    seconds = time.perf_counter() - start
    console.print(f"wrote {path} in {seconds:.1f} s ({plan.nbytes / 1e6 / seconds:,.0f} MB/s)")


def _outcome(rows: list[Any]) -> str:
    """One cell of the table of claims."""
    if not all(r.passed for r in rows):
        return "FAILED"
    worst = max((r.worst for r in rows), default=0)
    return f"ok {worst:.2f}" if worst else "ok"


@app.command()
def verify(
    directory: Annotated[
        Path | None, typer.Argument(help="Also read and check this checkpoint.", show_default=False)
    ] = None,
    threads: Threads = None,
) -> None:
    """Prove the kernels' claims on this machine's own processor; exit code 1 if one fails."""
    set_threads(threads)
    if directory:
        existing(directory)
    from . import verify as verify_

    console = terminal.console()
    with console.status("preparing cases") as status:
        rows = verify_.run(directory, lambda r: status.update(f"{r.isa} {r.op} {r.instance}"))
    isas = list(dict.fromkeys(r.isa for r in rows))
    table = terminal.table("", "op", "instance", "claim", "cases", *isas, left=3)
    lines: dict[tuple[str, str, str], dict[str, list[verify_.Row]]] = {}
    for r in rows:
        lines.setdefault((r.op, r.instance, r.claim), {}).setdefault(r.isa, []).append(r)
    for line, found in lines.items():
        cells = [_outcome(found.get(isa, [])) for isa in isas]
        table.add_row(*line, str(sum(r.cases for r in found[isas[0]])), *cells)
    console.print(table)
    console.print("numbers: largest error over the error that rounding allows")
    failed = [r for r in rows if not r.passed]
    for r in failed:
        console.print(f"{r.op} {r.instance} {r.isa} {r.claim}: {r.detail}")
    console.print(f"{len(rows) - len(failed)} of {len(rows)} claims hold on {ops.isas()}")
    if failed:
        _fail(f"{len(failed)} of {len(rows)} claims failed")


app.command()(cli_bench.bench)
