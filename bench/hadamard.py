"""hadamard: time of one row and of a prompt's rows, per instruction set.

    python bench/hadamard.py

One row is what a token costs each group of matrices that share its rotation; the Python call is
part of it. "ns/row" is the kernel alone: the slope between 1 and 33 rows that stay in cache, on one
thread. "GB/s" is many rows from memory and back, on all threads.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from hadamoe import _cpu, ops

#: (columns, block): JANGTQ's hidden and expert widths, TQ's blocks, the largest block.
WIDTHS = ((2048, 0), (512, 0), (768, 0), (2048, 128), (16384, 16384))


def seconds(rows: int, columns: int, block: int, calls: int = 2000) -> float:
    """Median time of one call."""
    x = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    signs, y, times = np.ones(columns, np.float32), np.empty_like(x), []
    for _ in range(calls):
        start = time.perf_counter()
        _cpu.call("hadamard", [x, signs, None], [y], [block], [])
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    threads = ops.threads()
    columns = ("columns", "block", "us/call", "ns/row", "GB/s")
    print("isa     ", *(f"{c:>8}" for c in columns))
    for isa in ops.isas():
        ops.set_isa(isa)
        for columns, block in WIDTHS:
            ops.set_threads(1)
            one, many = seconds(1, columns, block), seconds(33, columns, block)
            ops.set_threads(threads)
            rows = 4096 * 2048 // columns
            rate = 8 * rows * columns / seconds(rows, columns, block, 5) / 1e9
            print(
                f"{isa:8} {columns:8} {block or '2^n':>8} {one * 1e6:8.2f} "
                f"{(many - one) / 32 * 1e9:8.0f} {rate:8.1f}"
            )


if __name__ == "__main__":
    main()
