"""hadamoe beside llama.cpp on this machine: whole models and kernels, one table.

    python bench/peers/compare.py CHECKPOINT [CHECKPOINT ...]

Each checkpoint (`hadamoe synth FORMAT DIR`) meets a synthetic GGUF of its own depth with the
nearest types; both have their weights in anonymous memory. Reading alone is measured around every
figure. Writes bench/results/peers.json and peers.txt.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import build
import synthetic_gguf

from hadamoe import bench, formats, inspect, ops, terminal

RESULTS = Path(__file__).resolve().parent.parent / "results"
#: format -> (experts, everything else) of the GGUFs with the nearest bits
PEERS = {
    "mxfp4": [("mxfp4", "q8_0")],
    "jangtq": [("q2_k", "q8_0"), ("q2_k", "q4_0")],
    "mlx-affine": [("q2_k", "q8_0"), ("q2_k", "q4_0")],
    "tq": [("q3_k", "q8_0")],
}
#: ggml's types, and the instances that do the same work
KERNELS = {
    "mxfp4": ("e2m1/e8m0",),
    "q2_K": ("linear2/bf16", "codebook2/f16"),
    "q4_0": ("linear4/bf16", "linear_signed4/bf16", "codebook4/f32"),
    "q8_0": ("linear8/bf16", "linear_signed8/bf16"),
}
SHAPES = {"dense": (8192, 2048), "head": (248320, 2048), "experts": (1024, 2048)}
Figures = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="*", type=Path)
    parser.add_argument("--llama", type=Path, default=build.DEFAULT, help="where build.py built")
    parser.add_argument("--scratch", type=Path, help="for one GGUF at a time; default: --llama")
    parser.add_argument("--threads", type=int, default=ops.threads())
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pool", type=int, default=1024, help="MB of weights a kernel reads")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each kernel and shape")
    parser.add_argument("--rounds", type=int, default=3, help="of the kernels; the best counts")
    parser.add_argument("--no-kernels", dest="kernels", action="store_false")
    parser.add_argument("--keep", action="store_true", help="leave the GGUFs")
    parser.add_argument("--out", type=Path, default=RESULTS / "peers", help="stem of both files")
    args = parser.parse_args()
    args.scratch = args.scratch or args.llama
    for tool in (args.llama / "bin" / "llama-bench", args.llama / "ggml_kernels"):
        if not tool.exists():
            parser.error(f"no {tool}; first: python bench/peers/build.py {args.llama}")
    ops.set_threads(args.threads)
    return args


def read(program: list[Any]) -> str:
    """What a program prints; its errors end this one."""
    done = subprocess.run(list(map(str, program)), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(map(str, program))}\n{done.stderr[-4000:]}")
    return done.stdout


def ours(directory: Path, args: argparse.Namespace) -> Figures:
    """Figures of a checkpoint of ours."""
    command = [sys.executable, "-m", "hadamoe", "bench", directory, "--no-instances", "--resident"]
    command += ["--threads", args.threads, "--prompt-tokens", args.prompt]
    command += ["--new-tokens", args.new, "--repeats", args.repeats]
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        read([*command, "--json", out.name])
        report = json.loads(Path(out.name).read_text())
    m = report["model"]
    return {
        "runtime": "hadamoe",
        "weights": directory.name,
        "format": m["format"],
        "file GB": m["file GB"],
        "GB/token": m["read GB/token"],
        "prefill tok/s": m["prefill tok/s"],
        "decode tok/s": m["decode tok/s"],
        "peak over weights GB": m["peak over weights GB"],
    }


def theirs(experts: str, dense: str, layers: int, args: argparse.Namespace) -> Figures:
    """Figures of llama.cpp with these types."""
    path = args.scratch / f"{experts}-{dense}-{layers}.gguf"
    plan = synthetic_gguf.tensors(experts, dense, layers)
    size = sum(t.nbytes for t in plan)
    if not path.exists():
        if shutil.disk_usage(args.scratch).free < 1.05 * size:
            sys.exit(f"{args.scratch} has no room for {size / 1e9:.1f} GB; see --scratch")
        synthetic_gguf.write(str(path), experts, dense, layers)
    command = [args.llama / "bin" / "llama-bench", "-m", path, "-t", args.threads, "-lm", "none"]
    command += ["-p", args.prompt, "-n", args.new, "-r", args.repeats, "-o", "json"]
    tests = json.loads(read(command))
    if not args.keep:
        path.unlink()
    rate = {bool(t["n_gen"]): median(t["samples_ts"]) for t in tests}
    return {
        "runtime": f"llama.cpp {tests[0]['build_commit']}",
        "weights": f"{experts.upper()} experts, {dense.upper()} rest",
        "file GB": size / 1e9,
        "GB/token": sum(t.token_bytes for t in plan) / 1e9,
        "prefill tok/s": rate[False],
        "decode tok/s": rate[True],
    }


def beside_reading(measure: Any, args: argparse.Namespace) -> Figures:
    """Figures, and the read bandwidth before or after them, whichever was more."""
    before = bench.read_bandwidth(args.threads)
    figures = measure()
    read = max(before, bench.read_bandwidth(args.threads))
    figures["decode GB/s"] = figures["GB/token"] * figures["decode tok/s"]
    return figures | {"read GB/s": read, "of read": figures["decode GB/s"] / read}


def whole_models(args: argparse.Namespace) -> tuple[list[Figures], list[Figures]]:
    """(figures of each model, ratios of each pair)."""
    models, ratios, known = [], [], {}
    for directory in args.checkpoint:
        layers, kind = inspect.describe(directory).layers, formats.detect(directory)[0]
        print(f"hadamoe: {directory.name}", file=sys.stderr)
        mine = beside_reading(lambda d=directory: ours(d, args), args) | {"layers": layers}
        models.append(mine)
        for experts, dense in PEERS.get(kind, []):
            key = experts, dense, layers
            if key not in known:
                print(f"llama.cpp: {experts} experts, {dense} rest", file=sys.stderr)
                known[key] = beside_reading(lambda k=key: theirs(*k, args), args)
                models.append(known[key] | {"layers": layers})
            peer = known[key]
            names = ("GB/token", "prefill tok/s", "decode tok/s", "decode GB/s")
            ratio = {name: mine[name] / peer[name] for name in names}
            ratios.append({"weights": mine["weights"], "against": peer["weights"]} | ratio)
    return models, ratios


def kernels(args: argparse.Namespace) -> list[Figures]:
    """Each type and shape: llama.cpp's best time and ours, taken in turns."""
    instances = {str(i): i for i in ops.instances()}
    rows = []
    for kind, names in KERNELS.items():
        print(f"kernels: {kind}", file=sys.stderr)
        best: dict[tuple[str, str], Figures] = {}
        read_gbytes = 0.0
        for _ in range(args.rounds):
            read_gbytes = max(read_gbytes, bench.read_bandwidth(args.threads))
            program = [args.llama / "ggml_kernels", args.threads, args.pool, args.seconds, kind]
            found = [json.loads(line) for line in read(program).splitlines()]
            found = [f | {"kernel": f"{f['type']} {f['buffer']}"} for f in found]
            for r in bench.instances(
                read_gbytes, only=[instances[n] for n in names], budget=args.seconds,
                pool_bytes=args.pool << 20, shapes=SHAPES,
            ):  # fmt: skip
                size = r.rows * r.columns * (8 if r.what == "experts" else 1)
                micros = size * 2 / r.flops_per_byte / r.gbytes / 1e3
                found.append(
                    {"kernel": r.instance, "what": r.what, "microseconds": micros,
                     "gbytes": r.gbytes}
                )  # fmt: skip
            for f in found:
                key = f["what"], f["kernel"]
                if key not in best or f["microseconds"] < best[key]["microseconds"]:
                    best[key] = f
        for (what, kernel), f in best.items():
            peer = next(b for (w, _), b in best.items() if w == what and "type" in b)
            size = SHAPES[what][0] * SHAPES[what][1] * (8 if what == "experts" else 1)
            rows.append({
                "what": what, "against": peer["kernel"], "kernel": kernel,
                "bits": f["gbytes"] * f["microseconds"] * 8e3 / size,
                "microseconds": f["microseconds"], "GB/s": f["gbytes"],
                "of read": f["gbytes"] / read_gbytes,
                "times faster": peer["microseconds"] / f["microseconds"],
            })  # fmt: skip
    return sorted(rows, key=lambda r: list(SHAPES).index(r["what"]))


def show(report: Figures, out: Path) -> None:
    """The tables, on the terminal and as a file."""
    console = terminal.console()
    console.record = True
    m = report["machine"]
    console.print(
        f"{m['cpu']}, {m['threads']} of {m['cores']} cores, {m['isa']}, load before "
        f"{m['load_average'][0]}, {m['date']}\n$ {m['command']}"
    )
    columns = ("GB/token", "prefill tok/s", "decode tok/s", "decode GB/s", "read GB/s")
    table = terminal.table(
        "whole model", "runtime", "weights", "layers", "file GB", *columns, "of read", left=2
    )
    for f in report["models"]:
        figures = [f"{f[c]:.2f}" for c in ("file GB", *columns)]
        table.add_row(f["runtime"], f["weights"], str(f["layers"]), *figures, f"{f['of read']:.0%}")
    if report["models"]:
        console.print(table)
    columns = ("GB/token", "prefill tok/s", "decode tok/s", "decode GB/s")
    table = terminal.table("hadamoe over llama.cpp", "weights", "against", *columns, left=2)
    for f in report["ratios"]:
        table.add_row(f["weights"], f["against"], *(f"{f[c]:.2f}x" for c in columns))
    if report["ratios"]:
        console.print(table)
    columns = ("bits", "us", "GB/s", "of read", "times faster")
    table = terminal.table("one token, kernels", "what", "against", "kernel", *columns, left=3)
    for f in report["kernels"]:
        figures = [f"{f['bits']:.2f}", f"{f['microseconds']:.0f}", f"{f['GB/s']:.1f}"]
        faster = f"{f['times faster']:.2f}x" if f["kernel"] != f["against"] else ""
        table.add_row(f["what"], f["against"], f["kernel"], *figures, f"{f['of read']:.0%}", faster)
    if report["kernels"]:
        console.print(table)
    out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    console.save_text(str(out.with_suffix(".txt")))


def main() -> None:
    args = arguments()
    names = [Path(a).name if "/" in a else a for a in sys.argv[1:]]
    report: Figures = {"machine": bench.machine()}
    report["machine"]["command"] = shlex.join(["python", "bench/peers/compare.py", *names])
    report["kernels"] = kernels(args) if args.kernels else []
    report["models"], report["ratios"] = whole_models(args)
    show(report, args.out)


if __name__ == "__main__":
    main()
