"""What it costs to run an op on MLX arrays: microseconds per op of a chain, kernels on one thread.

    python bench/mlx_overhead.py

"lazy" builds the chain and evaluates it once, "eager" is what an MLX that `_mlx` was not built for
gets, "numpy" is the same op without MLX; MLX's own mx.abs shows what MLX itself costs. States of
the Gated DeltaNet are the model's, 2 MB: "held" keeps every old state alive, so each is copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from hadamoe import Instance, mlx, mlx_host, ops
from hadamoe.verify import layers, samples

CHAIN, REPEATS = 200, 20


def microseconds(step: Callable[[Any], Any], x: Any) -> float:
    """Fastest time per op of a chain."""
    times = []
    for _ in range(REPEATS):
        start, y = time.perf_counter(), x
        for _ in range(CHAIN):
            y = step(y)
        mx.eval(y)
        times.append(time.perf_counter() - start)
    return min(times) / CHAIN * 1e6


def delta_step(held: list | None) -> float:
    """Fastest time of a Gated DeltaNet's token, evaluated one by one."""
    rng = np.random.default_rng(0)
    heads, dims = (16, 32), (128, 128)
    arrays = layers.gated_delta_arrays(rng, 1, 1, *heads, *dims, 4)
    proj, *vectors, conv_state, state = (mx.array(a) for a in arrays.values())
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        y, *new = mlx.gated_delta(
            proj, *vectors, conv_state, state, heads=heads, head_dims=dims, eps=1e-6
        )
        if held is not None:
            held += [conv_state, state]
        conv_state, state = new
        del new
        mx.eval(y, conv_state, state)
        times.append(time.perf_counter() - start)
    return min(times) * 1e6


def main() -> None:
    ops.set_threads(1)
    rng = np.random.default_rng(0)
    weight = ops.pack(samples.random_weight(rng, Instance("linear", 4, "f32"), 128, 128))
    numpys = rng.standard_normal((1, 128)).astype(np.float32)
    x = mx.array(numpys)
    chains = {"hadamard": ops.hadamard, "qmatmul": lambda a: ops.qmatmul(a, weight)}
    lazy = mlx_host.bridge
    print("op of 1 x 128    lazy   eager   numpy")
    print(f"mx.abs        {microseconds(mx.abs, x):7.1f}")
    for name, step in chains.items():
        columns = [microseconds(step, x) if lazy else float("nan")]
        mlx_host.bridge = None
        columns.append(microseconds(step, x))
        mlx_host.bridge = lazy
        columns.append(microseconds(step, numpys))
        print(f"{name:12}", *(f"{c:7.1f}" for c in columns))
    print(f"gated_delta: states {delta_step(None):.0f} us, held {delta_step([]):.0f} us")


if __name__ == "__main__":
    main()
