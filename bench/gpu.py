"""The CUDA backend on this machine's GPU: claims, kernels and whole models in one report.

    bash bench/gpu.sh            builds for this GPU, then runs this file

1. The claims of the CUDA kernels (tests/cuda) on the device.
2. compute-sanitizer (memcheck, racecheck) over every format's tiny checkpoint.
3. The rate of a copy, and beside it: full-shape synthetic checkpoints (prompt, decode, batches, a
   long context, microseconds per kernel); every instance with 1, 4 and 8 tokens, dense, as
   large as a head and 8 of 256 experts, over weights several times the L2; the Hadamard rotation;
   gated delta layers; products of prompts beside torch's bf16 matmul.

Nothing passes or fails but claims and sanitizers. A step that breaks says so and the next runs;
what there was no time for is named.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_kernels import (
    Clock,
    copy_rate,
    deltas,
    hadamards,
    products,
    prompts,
    show_delta,
    show_hadamard,
    show_product,
    show_prompt,
)  # fmt: skip
from gpu_models import Sizes, models, show_model, tiny
from steps import attempt, attempts

from hadamoe import _cuda, bench, synth

ROOT = Path(__file__).resolve().parent.parent


# ---- claims and sanitizers


def claims(clock: Clock) -> dict[str, Any]:
    """How many tests of the CUDA kernels passed here, and the names of those that did not."""
    command = [sys.executable, "-m", "pytest", "tests/cuda", "--device", "-rfE", "-n", "4"]
    return run(command, min(240.0, clock.left))


def run(command: list[str], limit: float) -> dict[str, Any]:
    """A command's last line, failures and exit code."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as late:
        return {"summary": f"not done after {limit:.0f} s", "output": str(late.stdout)[-4000:]}
    lines = (done.stdout + done.stderr).splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "========="))]
    return {
        "exit": done.returncode,
        "summary": lines[-1] if lines else "",
        "failed": failed if done.returncode else [],
        "output": "\n".join(lines)[-20000:] if done.returncode else "",
    }


def sanitize(clock: Clock) -> dict[str, Any]:
    """What compute-sanitizer's tools find in `tiny`."""
    if not shutil.which("compute-sanitizer"):
        return {"left_out": "no compute-sanitizer on PATH"}
    found = {}
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        command += [sys.executable, str(Path(__file__)), "--tiny"]
        left = clock.left
        found[tool] = run(command, min(120.0, left)) if left > 20 else {"left_out": "no time"}
    return found


# ---- the report


def machine() -> dict[str, Any]:
    """The GPU, its driver, and what `bench.machine` says of the rest."""
    return bench.machine() | {"gpu": _cuda.device(0), "compiled_for": _cuda.architectures()}


def measure(folder: Path, sizes: Sizes, built: float) -> tuple[dict[str, Any], list[str]]:
    """Every step: what it found, and its lines."""
    clock, lines = Clock(sizes.minutes, built), []

    def say(line: str) -> str:
        lines.append(line)
        return line

    report: dict[str, Any] = {"machine": machine(), "built_s": built}
    print(say(json.dumps(report["machine"])), flush=True)
    copy = report["copy_gbytes"] = copy_rate(sizes.copy)
    print(say(f"copy: {copy:.0f} GB/s, read and written"), flush=True)
    report["claims"] = attempt(lambda: claims(clock))
    print(say(f"tests/cuda on the device: {report['claims'].get('summary')}"), flush=True)
    shown = {
        "models": (lambda: models(folder, copy, sizes, clock), show_model),
        "products": (lambda: products(copy, sizes.pool, clock), show_product),
        "hadamard": (lambda: hadamards(copy), show_hadamard),
        "gated_delta": (lambda: deltas(copy), show_delta),
        "prompts": (lambda: prompts(clock), show_prompt),
    }
    report["sanitizers"] = attempt(lambda: sanitize(clock))
    print(say(f"compute-sanitizer: {summary(report['sanitizers'])}"), flush=True)
    for name, (rows, show) in shown.items():
        report[name] = attempts(rows(), lambda row, show=show: say(show(row)))
    return report, lines


def summary(found: dict[str, Any]) -> str:
    """Sanitizers in a line."""
    if "memcheck" not in found:
        return str(found)
    return ", ".join(f"{t}: {f.get('summary', f.get('left_out'))}" for t, f in found.items())


def main(argv: list[str] | None = None) -> None:
    """Measures and writes the report."""
    standard = Sizes()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu.json")
    parser.add_argument(
        "--folder", type=Path, default=Path("/dev/shm"), help="for checkpoints, 28 GB"
    )
    parser.add_argument("--shape", choices=synth.PRESETS, default=standard.shape)
    parser.add_argument("--pool", type=int, default=standard.pool >> 20, help="MB per instance")
    parser.add_argument("--prompt", type=int, default=standard.prompt, help="tokens")
    parser.add_argument("--context", type=int, default=standard.context, help="a long prompt")
    parser.add_argument("--tokens", type=int, default=standard.tokens, help="decoded")
    parser.add_argument("--batches", type=int, nargs="*", default=standard.batches)
    parser.add_argument("--minutes", type=float, default=standard.minutes, help="for all of it")
    parser.add_argument("--built", type=float, default=0.0, help="seconds of them already spent")
    parser.add_argument("--tiny", action="store_true", help="only what sanitizers watch")
    args = parser.parse_args(argv)
    sizes = Sizes(
        pool=args.pool << 20, copy=min(standard.copy, 4 * args.pool << 20), shape=args.shape,
        prompt=args.prompt, context=args.context, tokens=args.tokens, minutes=args.minutes,
        batches=tuple(args.batches),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        if args.tiny:
            tiny(Path(name))
            return
        report, lines = measure(Path(name), sizes, args.built)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    args.out.with_suffix(".txt").write_text("\n".join(lines) + "\n")
    print(f"\nwritten: {args.out.name}, {args.out.with_suffix('.txt').name}")


if __name__ == "__main__":
    main()
