"""qmatmul beside a pure read of as many bytes: every instance, one token, beyond any cache.

    python bench/qmatmul.py [--pool MB] [--rounds N] [instance ...]

Dense: matrices of 2048 columns and 8192 rows, one after the other. Experts: 8 random ones of 256 a
call, 2048 to 512. Each figure is the best of the rounds, and reads are measured between them.
"""

from __future__ import annotations

import argparse

from hadamoe import bench, ops


def best(instance, threads: int, pool: int, rounds: int) -> tuple[float, dict[str, float]]:
    """(read bandwidth, {what: rate}), 1e9 bytes/s."""
    ops.set_threads(threads)
    read, rates = 0.0, {}
    for _ in range(rounds):
        read = max(read, bench.read_bandwidth(threads, pool, 0.2))
        for row in bench.instances(read, only=[instance], budget=0.2, pool_bytes=pool):
            rates[row.what] = max(rates.get(row.what, 0.0), row.gbytes)
    return read, rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("instance", nargs="*", help="parts of names; all without")
    parser.add_argument("--pool", type=int, default=1024, help="MB each measurement reads")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    for instance in ops.instances():
        if args.instance and not any(name in str(instance) for name in args.instance):
            continue
        for threads in (1, 2):
            read, rates = best(instance, threads, args.pool << 20, args.rounds)
            figures = "  ".join(f"{w} {r:5.1f} ({r / read:4.0%})" for w, r in rates.items())
            print(f"{instance!s:20} {threads} threads  read {read:5.1f}  {figures}", flush=True)


if __name__ == "__main__":
    main()
