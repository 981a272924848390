"""Launches of one decoded token on CUDA, counted where PyTorch makes them; needs no GPU.

    python bench/cuda_tokens.py [--batch 1] [--kv bf16] [--out FILE]

What a graph would record is noted, and nothing runs. Four layers of the full model are built (three
Gated DeltaNet, one attention) and counted for forty. Times are bytes over an assumed copy rate:
arithmetic, not measurements.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from token_bytes import weight_bytes
from torch.utils._python_dispatch import TorchDispatchMode

import hadamoe
from hadamoe import synth, torch_cuda
from hadamoe.torch_cuda_decode import Batch

LAYERS, BUILT = 40, 4
#: Fewer than the model's 256, which does not change launches.
EXPERTS = 16
FORMATS = ["config-i", "jangtq2", "mxfp4", "tq-apex2", "w4a16"]
#: What copies within an H200's memory were measured to move, GB/s.
RATE = 4300


class Counting(TorchDispatchMode):
    """A GPU that notes what is launched, torch's own kernels too, and runs none of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and "empty" not in name:
            self.names.append(f"torch {name}")
        return func(*args, **(kwargs or {}))

    def device(self, wanted: torch.device) -> torch.device:
        return torch.device("cpu")

    def launch(self, launch: Any, arrays: Any) -> None:
        self.names.append(launch.kernel)

    def array(self, array: np.ndarray, device: torch.device) -> torch.Tensor:
        return torch.from_numpy(np.array(array, order="C"))

    def free_bytes(self, device: torch.device) -> int:
        return 1 << 40


def token(directory: Path, batch: int, kv: str) -> Counter[str]:
    """Launches of a token of the full model by kernel, from one of `BUILT` layers."""
    torch_cuda.machine = counting = Counting()
    model, _ = hadamoe.load(directory, device="cuda", kv=kv)
    text, head, choice = model.model.parts()
    sequences = Batch(text, head, batch, 512, choice)
    layers, states, counts = text.layers, sequences.states, []
    for built in (BUILT, 0):
        text.layers, sequences.states = layers[:built], states[:built]
        counting.names.clear()
        with torch.no_grad(), counting:
            sequences.record()
        counts.append(Counter(counting.names))
    whole, ends = counts
    whole.subtract(ends)
    return ends + Counter({name: n * LAYERS // BUILT for name, n in whole.items()})


def table(formats: list[str], batch: int, kv: str) -> list[str]:
    """The report's lines."""
    lines = [f"{'format':10}{'launches':>9}{'weights GB':>12}{'H200, us':>10}"]
    for name in formats:
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder, name)
            shape = replace(synth.PRESETS["full"], layers=BUILT, experts=EXPERTS)
            synth.plan(name, shape, mtp=False).write(directory)
            kernels = token(directory, batch, kv)
        read = weight_bytes(name) / 1e9
        lines.append(f"{name:10}{kernels.total():9}{read:12.2f}{1e6 * read / RATE:10.0f}")
    lines += [f"  {n:4} {kernel}" for kernel, n in kernels.most_common()]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--kv", default="bf16", help="how keys and values are kept")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--out", type=Path, help="file for the table")
    args = parser.parse_args()
    lines = [
        f"One decoded token, batch {args.batch}, {args.kv}; kernels of the last format below.",
        f"us: the weights a token of one sequence reads, at {RATE} GB/s. Arithmetic, not measured.",
        *table(args.formats, args.batch, args.kv),
    ]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
