"""What simulation cannot show, measured on a Mac: one report file to send back.

    bash bench/mac.sh [WHEEL]            installs into .venv-mac, then runs this file

1. The claims of the Metal kernels (tests/metal) on this GPU, those of the NEON kernels (hadamoe
   verify) on this CPU.
2. The rate of a copy, and every instance's product with one token beside it.
3. Full-shape synthetic checkpoints, as many as fit: prompt and decode, ours and, where stock mlx-lm
   reads the format, stock mlx-lm on the same files in the same run.

Nothing passes or fails but the claims. A step that breaks says so in the report and the next runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from steps import attempt, attempts

from hadamoe import Weight, bench, inspect, mlx_gpu, ops, synth

ROOT = Path(__file__).resolve().parent.parent
#: What mlx-lm itself reads.
STOCK = ("config-i", "mxfp4")
#: Behind a long context: the smallest format, over mlx-lm's own KV cache and over a quantized one.
LONG = ("jangtq2", ("bf16", "hk4v3"))
#: Beyond the weights: a prompt's activations, caches, the system's own.
SPARE = 3 << 30
EXPERTS = 8
BUDGET = 0.5


@dataclass(frozen=True)
class Sizes:
    """How much is measured; a Mac takes the defaults."""

    pool: int = 512 << 20
    copy: int = 1 << 30
    shape: str = "full"
    prompt: int = 512
    context: int = 8192
    tokens: int = 128
    tests: bool = True


# ---- 1. claims


def claims() -> dict[str, Any]:
    """How many tests of the Metal kernels passed here, and the names of those that did not."""
    command = [sys.executable, "-m", "pytest", "tests/metal", "--device", "-rfE"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {
        "summary": lines[-1] if lines else done.stderr[-2000:],
        "failed": failed,
        "output": done.stdout[-30000:] if done.returncode else "",
    }


def verify() -> dict[str, Any]:
    """`hadamoe verify`: the claims of the kernels of this processor."""
    command = [sys.executable, "-m", "hadamoe", "verify"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {"exit": done.returncode, "isas": ops.isas(), "output": done.stdout[-4000:]}


# ---- 2. kernels


def copy_rate(nbytes: int) -> float:
    """1e9 bytes a second, read and written, of a copy too large for any cache."""
    x = mx.zeros(nbytes // 4, mx.float32)
    mx.eval(x)
    seconds = bench.fastest(lambda: mx.eval(mx.negative(x)), BUDGET)
    return 2 * x.nbytes / seconds / 1e9


def products(copy: float, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """One token through each instance: a matrix after the other, and 8 experts after 8 others."""
    for instance in ops.instances():
        for what, (rows, columns) in bench.SHAPES.items():
            row = attempt(lambda a=(instance, what, rows, columns): product(*a, sizes.pool))
            if "gbytes" in row:
                row["of_copy"] = row["gbytes"] / copy
            yield {"instance": str(instance), "what": what, **row}
            mx.clear_cache()


def product(instance: Any, what: str, rows: int, columns: int, pool_bytes: int) -> dict[str, Any]:
    """1e9 bytes of codes, scales and biases a second, over a pool of matrices."""
    x = mx.array(np.random.default_rng(1).standard_normal((1, columns), np.float32))
    pool = bench.Pool(instance, rows, columns, pool_bytes, least=EXPERTS)
    parts = [pool.part(i) for i in range(pool.matrices)]
    if what == "experts":
        count = len(parts) // EXPERTS * EXPERTS
        packed = [ops.pack(Weight(columns, tuple((part,) for part in parts[:count])))]
        picks = np.random.default_rng(2).permutation(count).astype(np.int32)
        experts = [mx.array(p) for p in picks.reshape(-1, 1, EXPERTS)]
        calls = [(mlx_gpu.resident(packed[0]), e) for e in experts]
    else:
        packed = [ops.pack(Weight(columns, ((part,),))) for part in parts]
        calls = [(mlx_gpu.resident(w), None) for w in packed]
    nbytes = parts[0].nbytes * len(calls) * (EXPERTS if what == "experts" else 1)

    def once() -> None:
        mx.eval([mlx_gpu.product(x, weight, expert=e) for weight, e in calls])

    return {"gbytes": nbytes / bench.fastest(once, BUDGET) / 1e9}


# ---- 3. models


def models(folder: Path, copy: float, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Every format that fits in memory and on disk, one at a time."""
    for name in synth.FORMATS:
        plan = synth.plan(name, synth.PRESETS[sizes.shape])
        room = mx.device_info()["max_recommended_working_set_size"] - SPARE
        free = shutil.disk_usage(folder).free
        if plan.nbytes > min(room, free):
            there = f"memory for the GPU is {room / 1e9:.1f} GB, disk {free / 1e9:.1f} GB"
            yield {"format": name, "left_out": f"{plan.nbytes / 1e9:.1f} GB; {there}"}
            continue
        directory = folder / name
        try:
            plan.write(directory)
            per_token = inspect.describe(directory).token_bytes
            runs = [("hadamoe", "bf16", sizes.prompt)]
            runs += [("mlx-lm", "bf16", sizes.prompt)] if name in STOCK else []
            runs += [("hadamoe", kv, sizes.context) for kv in LONG[1] if name == LONG[0]]
            for who, kv, tokens in runs:
                options = {"hadamoe": False} if who == "mlx-lm" else {"kv": kv}
                row = attempt(lambda a=(directory, options, tokens): speed(*a, sizes.tokens))
                if "decode" in row:
                    row["gbytes"] = row["decode"] * per_token / 1e9  # of weights
                    row["of_copy"] = row["gbytes"] / copy
                yield {"format": name, "who": who, "kv": kv, "context": tokens, **row}
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def speed(directory: Path, options: dict[str, Any], context: int, tokens: int) -> dict[str, Any]:
    """Tokens a second of a prompt and of decoding behind it, and the memory that took."""
    from mlx_lm import utils
    from mlx_lm.generate import generate_step

    mx.reset_peak_memory()
    model, config = utils.load_model(directory, model_config=options)
    vocabulary = config.get("text_config", config)["vocab_size"]
    prompt = mx.array(np.random.default_rng(0).integers(0, vocabulary, context))
    times = []
    for _ in range(2):  # the first compiles the kernels
        times = [time.perf_counter()]
        for _token in generate_step(prompt, model, max_tokens=tokens):
            times.append(time.perf_counter())
    steps = np.diff(times[1:])  # MLX works a token ahead: the first comes with the prompt
    row = {
        "prompt": context / (times[1] - times[0]),
        "decode": float(1 / np.median(steps)),
        "slowest_ms": float(1e3 * steps.max()),
        "peak_gb": mx.get_peak_memory() / 1e9,
    }
    del model
    gc.collect()
    mx.clear_cache()
    return row


# ---- the report


def machine() -> dict[str, Any]:
    """The Mac: chip, memory, system, versions."""
    found = bench.machine()
    found["device"] = {k: v for k, v in mx.device_info().items() if isinstance(v, (str, int))}
    for name in ("mlx", "mlx-lm"):
        found["versions"][name] = bench.metadata.version(name)
    found["macos"] = platform.mac_ver()[0]
    for key in ("machdep.cpu.brand_string", "hw.memsize", "hw.model"):
        done = shutil.which("sysctl") and subprocess.run(
            ["sysctl", "-n", key], capture_output=True, text=True
        )
        found[key] = done.stdout.strip() if done else ""
    return found


def show_product(row: dict[str, Any]) -> str:
    """One line of the table of instances."""
    return f"{row['instance']:20} {row['what']:8} {row['gbytes']:7.1f} GB/s  {row['of_copy']:6.1%}"


def show_model(row: dict[str, Any]) -> str:
    """One line of the table of models."""
    if "left_out" in row:
        return f"{row['format']:10} left out: {row['left_out']}"
    what = f"{row['format']:10} {row['who']:8} {row['kv']:6} {row['context']:5} tokens"
    rate = f"{row['decode']:7.2f} tok/s = {row['gbytes']:6.1f} GB/s, {row['of_copy']:.1%} of a copy"
    return f"{what}  prompt {row['prompt']:8.1f} tok/s  decode {rate}"


def measure(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Every step; what it found."""
    if mlx_gpu.device() != "metal":
        sys.exit("bench/mac.py: MLX computes on no Metal device here; this needs a Mac")
    report: dict[str, Any] = {"machine": machine()}
    print(json.dumps(report["machine"]), flush=True)
    if sizes.tests:
        report["metal"] = attempt(claims)
        print("tests/metal:", report["metal"].get("summary"), flush=True)
        report["neon"] = attempt(verify)
        print("hadamoe verify: exit", report["neon"].get("exit"), flush=True)
    copy = report["copy_gbytes"] = copy_rate(sizes.copy)
    print(f"copy: {copy:.1f} GB/s, read and written", flush=True)
    report["products"] = attempts(products(copy, sizes), show_product)
    report["models"] = attempts(models(folder, copy, sizes), show_model)
    return report


def main(argv: list[str] | None = None) -> None:
    """Measures and writes the report."""
    standard = Sizes()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("hadamoe-mac.json"))
    parser.add_argument("--folder", type=Path, help="where checkpoints are written, 28 GB at once")
    parser.add_argument("--shape", choices=synth.PRESETS, default=standard.shape)
    parser.add_argument("--pool", type=int, default=standard.pool >> 20, help="MB per instance")
    parser.add_argument("--prompt", type=int, default=standard.prompt, help="tokens")
    parser.add_argument("--context", type=int, default=standard.context, help="a long prompt")
    parser.add_argument("--tokens", type=int, default=standard.tokens, help="decoded")
    parser.add_argument("--no-tests", action="store_true", help="measures only")
    args = parser.parse_args(argv)
    sizes = Sizes(
        pool=args.pool << 20,
        copy=min(standard.copy, 2 * args.pool << 20),
        shape=args.shape,
        prompt=args.prompt,
        context=args.context,
        tokens=args.tokens,
        tests=not args.no_tests,
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        report = measure(Path(name), sizes)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nPlease send back {args.out.resolve()}")


if __name__ == "__main__":
    main()
