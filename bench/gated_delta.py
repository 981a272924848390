"""gated_delta: a step and a prompt at the model's shape, per instruction set and thread count.

    python bench/gated_delta.py

Steps rotate over 30 layers' states (63 MB), so each comes from memory as in the model. A step moves
the state twice (4.2 MB); "of read" compares that rate with what reading alone reaches here.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from hadamoe import _cpu, ops
from hadamoe.bench import read_bandwidth

LAYERS, HK, HV, DK, DV, TAPS = 30, 16, 32, 128, 128, 4
CHANNELS = 2 * HK * DK + HV * DV
STATE_BYTES = 2 * 4 * HV * DK * DV  # read and written


def layers(rng: np.random.Generator) -> list[tuple[list[np.ndarray], list[np.ndarray]]]:
    """(constants, states) of each layer."""

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return [
        (
            [normal(CHANNELS, TAPS), normal(HV), normal(HV), normal(DV)],
            [normal(1, CHANNELS, TAPS), normal(1, HV, DK, DV)],
        )
        for _ in range(LAYERS)
    ]


def seconds(model, tokens: int, rounds: int) -> float:
    """Median time of one layer."""
    rng = np.random.default_rng(1)
    width = CHANNELS + HV * DV + 2 * HV
    proj = rng.standard_normal((1, tokens, width)).astype(np.float32)
    y, times = np.empty((1, tokens, HV * DV), np.float32), []
    for _ in range(rounds):
        start = time.perf_counter()
        for constants, states in model:
            _cpu.call("gated_delta", [proj, *constants], [y, *states], [HK, HV, DK, DV], [1e-6])
        times.append((time.perf_counter() - start) / LAYERS)
    return statistics.median(times)


def main() -> None:
    model, most = layers(np.random.default_rng(0)), ops.threads()
    columns = ("threads", "us/step", "GB/s", "of read", "prompt us/token")
    print("isa     ", *(f"{c:>8}" for c in columns))
    for threads in sorted({1, most}):
        read = read_bandwidth(threads)
        ops.set_threads(threads)
        for isa in ops.isas():
            ops.set_isa(isa)
            step, prompt = seconds(model, 1, 20), seconds(model, 128, 1) / 128
            rate = STATE_BYTES / step / 1e9
            print(
                f"{isa:8} {threads:8} {step * 1e6:8.0f} {rate:8.1f} {rate / read:8.0%} "
                f"{prompt * 1e6:15.1f}"
            )


if __name__ == "__main__":
    main()
