"""Launches and bytes of one decoded token on Metal, ours beside stock mlx-lm's, from their graphs.

    python bench/metal_tokens.py [--context 128] [--out FILE]

Nothing runs on a GPU: MLX records the operations of a decode step (`mx.export_function`), and each
is counted as it would be launched. Four layers of the full model are built (three Gated DeltaNet,
one attention) and counted for forty; `count` says how. Times are bytes over a machine's bandwidth:
arithmetic, not measurements. `hadamoe` is imported where it is used, for with it mlx_lm.load opens
our models.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten
from token_bytes import weight_bytes

#: Published memory bandwidth, GB/s.
MACHINES = {"M4 Pro": 273, "M4 Max": 546, "M5 Max": 614, "M3 Ultra": 819}
#: Operations that only describe their input anew; copies some may need are not counted.
VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Contiguous", "Copy", "Depends", "ExpandDims",
    "Flatten", "Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten",
    "View",
}  # fmt: skip
LAYERS, BUILT = 40, 4
#: Fewer than the model's 256, which changes neither launches nor what they move beside weights.
EXPERTS = 16
FORMATS = ["config-i", "jangtq2", "mxfp4", "tq-apex2", "w4a16"]
#: Formats that mlx-lm reads itself.
STOCK = ("config-i", "mxfp4")


def one_launch(fun: Callable) -> Callable:
    """``fun`` recorded as a single operation that reads its arguments and writes its results."""

    def call(*args: Any, **named: Any) -> Any:
        result = fun(*args, **named)
        outputs = list(result) if isinstance(result, tuple | list) else [result]
        inputs = [a for a in (*args, *named.values()) if isinstance(a, mx.array)]
        names = [f"{kind}{i}" for kind, n in (("x", inputs), ("y", outputs)) for i in range(len(n))]
        kernel = mx.fast.metal_kernel("fused", names[: len(inputs)], names[len(inputs) :], "")
        recorded = kernel(
            inputs=inputs, output_shapes=[o.shape for o in outputs],
            output_dtypes=[o.dtype for o in outputs], grid=(1, 1, 1), threadgroup=(1, 1, 1),
        )  # fmt: skip
        return type(result)(recorded) if isinstance(result, tuple | list) else recorded[0]

    return call


def on_metal() -> None:
    """Lets Python code that asks find a Metal device. Call before importing mlx_lm.

    `mx.fast` functions are one launch each, as on Metal. So is a function under `mx.compile`, which
    is better than MLX does: it cannot fuse everything.
    """
    mx.metal.is_available = lambda: True
    mx.default_device = lambda: mx.Device(mx.gpu, 0)
    for name in ("rms_norm", "layer_norm", "rope", "scaled_dot_product_attention"):
        setattr(mx.fast, name, one_launch(getattr(mx.fast, name)))
    mx.dequantize = one_launch(mx.dequantize)
    mx.compile = lambda fun=None, *_, **__: mx.compile if fun is None else one_launch(fun)
    mx.contiguous = lambda a, *_, **__: a  # has no recorded form


class Count(NamedTuple):
    """Launches, and bytes they read and write beside weights."""

    launches: int
    nbytes: int

    def __add__(self, other: Count) -> Count:
        return Count(self.launches + other.launches, self.nbytes + other.nbytes)

    def times(self, n: float) -> Count:
        return Count(round(self.launches * n), round(self.nbytes * n))


def count(step: Callable[[mx.array], list[mx.array]]) -> Count:
    """What the results of ``step`` take, views aside.

    An operation reads each input once and writes its results; an update in place moves what it is
    given. Weights are arrays that were there before and are no state, which has a batch of one in
    front.
    """
    records: list[dict] = []
    mx.export_function(records.append, step, mx.zeros((1, 1), mx.int32))
    (stored,) = (r["constants"] for r in records if r["type"] == "constants")
    weights = {name for name, a in stored if a.ndim < 3 or a.shape[0] != 1}
    total = Count(0, 0)
    for r in records:
        if r["type"] != "primitive":
            continue
        if r["name"] in VIEWS:
            if r["inputs"][0][0] in weights:
                weights |= {out[0] for out in r["outputs"]}
            continue
        inputs = {i[0]: i for i in r["inputs"] if i[0] not in weights}.values()
        moved = sum(map(size, r["outputs"])) + sum(map(size, inputs))
        if "SliceUpdate" in r["name"]:
            moved = 2 * size(r["inputs"][1])
        total += Count(1, moved)
    return total


def size(tensor: tuple) -> int:
    """Bytes of a recorded tensor (name, shape, dtype)."""
    return math.prod(tensor[1]) * tensor[2].size


def token(model: Any, cache: list[Any]) -> Count:
    """A decoded token of the full model, from one of `BUILT` layers whose caches are filled."""
    text = model.language_model

    def whole(ids: mx.array) -> list[mx.array]:
        logits = model(ids, cache=cache)
        states = tree_flatten([c.state for c in cache])
        return [mx.argmax(logits[:, -1], -1), *(a for _, a in states if isinstance(a, mx.array))]

    def ends(ids: mx.array) -> list[mx.array]:
        hidden = text.model.norm(text.model.embed_tokens(ids))
        return [mx.argmax(text.lm_head(hidden)[:, -1], -1)]

    outside = count(ends)
    layers = count(whole) + outside.times(-1)
    return layers.times(LAYERS / BUILT) + outside


def filled(model: Any, context: int) -> list[Any]:
    """Caches after ``context`` tokens, of zeros."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    for layer, c in zip(model.layers, cache, strict=True):
        if layer.is_linear:
            mixer = layer.linear_attn
            c[0], c[1] = (mx.zeros(shape, dtype) for shape, dtype in state_shapes(mixer))
        else:
            kv = mx.zeros((1, 2, context, 256), mx.bfloat16)
            c.update_and_fetch(kv, kv)
    mx.eval([c.state for c in cache])
    return cache


def state_shapes(mixer: Any) -> list[tuple[tuple[int, ...], mx.Dtype]]:
    """Conv window and state of a Gated DeltaNet, ours or mlx-lm's."""
    ours = not hasattr(mixer, "conv1d")
    window = ((1, 8192, 4), mx.float32) if ours else ((1, 3, 8192), mx.bfloat16)
    return [window, ((1, 32, 128, 128), mx.float32)]


def measure(whose: str, directory: Path, context: int) -> Count:
    """A token's count for one checkpoint: "ours" or "stock"."""
    on_metal()
    if whose == "ours":
        import hadamoe

        model, _ = hadamoe.load(directory, framework="mlx")
    else:
        import mlx_lm

        model, _ = mlx_lm.load(str(directory))
    return token(model, filled(model, context))


def measured(whose: str, directory: Path, context: int) -> Count:
    """`measure` in a process of its own: what it patches must not be seen by another."""
    command = [
        sys.executable,
        __file__,
        "--count",
        whose,
        str(directory),
        "--context",
        str(context),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{run.stderr}")
    return Count(*json.loads(run.stdout))


def table(formats: list[str], context: int) -> list[str]:
    """The report's lines."""
    from hadamoe import synth

    machines = "".join(f"{f'{name}, ms':>14}" for name in MACHINES)
    head = f"{'format':10}{'whose':8}{'launches':>9}{'weights GB':>12}{'others MB':>11}{machines}"
    lines = [head]
    for name in formats:
        weights = weight_bytes(name)
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder, name)
            shape = replace(synth.PRESETS["full"], layers=BUILT, experts=EXPERTS)
            synth.plan(name, shape, mtp=False).write(directory)
            for whose in ("ours", "stock") if name in STOCK else ("ours",):
                n = measured(whose, directory, context)
                times = (1e3 * (weights + n.nbytes) / (rate * 1e9) for rate in MACHINES.values())
                lines.append(
                    f"{name:10}{whose:8}{n.launches:9}{weights / 1e9:12.2f}{n.nbytes / 1e6:11.0f}"
                    + "".join(f"{ms:14.2f}" for ms in times)
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=128, help="tokens before the one counted")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--out", type=Path, help="file for the table")
    parser.add_argument("--count", nargs=2, metavar=("WHOSE", "DIR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.count:
        print(json.dumps(measure(args.count[0], Path(args.count[1]), args.context)))
        return
    rates = ", ".join(f"{name} {rate} GB/s" for name, rate in MACHINES.items())
    lines = [
        f"One decoded token after {args.context}, counted from MLX {mx.__version__}'s graphs.",
        f"ms: bytes over the published memory bandwidth ({rates}). Arithmetic, not measured.",
        "stock: mlx-lm's own model, where it reads the format.",
        *table(args.formats, args.context),
    ]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
