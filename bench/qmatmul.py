"""qmatmul beside a pure read of as many bytes: every instance, beyond any cache.

    python bench/qmatmul.py [--pool MB] [--rounds N] [--out FILE] [instance ...]

Dense: matrices of 2048 columns and 8192 rows, one after the other. Experts: 8 random ones of 256 a
call, 2048 to 1024. One token: 1e9 bytes of weights a second, and the share of the read bandwidth.
Four tokens: their time over that of one, through the same weights. Each figure is the best of the
rounds, and reads are measured between them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hadamoe import bench, ops

WHAT = tuple(bench.SHAPES)


def best(instance, threads: int, pool: int, rounds: int) -> tuple[float, dict[tuple, float]]:
    """(read bandwidth, {(what, tokens): rate}), 1e9 bytes/s."""
    ops.set_threads(threads)
    read, rates = 0.0, {}
    for _ in range(rounds):
        read = max(read, bench.read_bandwidth(threads, pool, 0.2))
        for tokens in (1, 4):
            for row in bench.instances(
                read, only=[instance], budget=0.2, pool_bytes=pool, tokens=tokens
            ):
                key = row.what, tokens
                rates[key] = max(rates.get(key, 0.0), row.gbytes)
    return read, rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("instance", nargs="*", help="parts of names; all without")
    parser.add_argument("--pool", type=int, default=2048, help="MB each measurement reads")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    lines = [json.dumps(bench.machine())]
    print(lines[0])
    for instance in ops.instances():
        if args.instance and not any(name in str(instance) for name in args.instance):
            continue
        for threads in args.threads:
            read, rates = best(instance, threads, args.pool << 20, args.rounds)
            figures = "  ".join(
                f"{w} {rates[w, 1]:5.1f} ({rates[w, 1] / read:4.0%})"
                f" 4 tokens x{rates[w, 1] / rates[w, 4]:.2f}"
                for w in WHAT
            )
            lines.append(f"{instance!s:19} {threads} threads  read {read:5.1f}  {figures}")
            print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
