"""One small model, five low-bit formats, the same kernels.

The model (8 layers: 6 gated delta nets, 2 attention; 8 experts) was trained for half an hour on the
text of Python's standard library, byte by byte, and converted by each format's own tool
(checkpoints/README.md). This generates text with all of them and scores held-out text:

    python examples/five_formats.py

The figures to expect are recorded in checkpoints/README.md: the bits per byte of an independent
decoder and transformers' own layers in f32.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import hadamoe
from hadamoe import inspect, torch_run

HERE = Path(__file__).resolve().parent / "checkpoints"
#: directory, name, bits per byte recorded for an independent decoder (checkpoints/README.md)
MODELS = (
    ("stdlib_bf16", "BF16 source", 1.9972),
    ("stdlib_configi", "Config-I (MLX affine 2/3/4/8)", 2.0041),
    ("stdlib_tq_apex2", "TQ-apex2 (TQ3/TQ4)", 2.0001),
    ("stdlib_jangtq2", "JANGTQ2", 2.0142),
    ("stdlib_mxfp4", "MXFP4 + affine 5/6/8", 1.9957),
    ("stdlib_w4a16", "W4A16 (int4/int8 + BF16)", 1.9979),
)
PROMPT = "    if not isinstance("  # the continuation differs from format to format


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--score-bytes", type=int, default=16_384)
    options = parser.parse_args()
    heldout = (HERE / "stdlib_bf16" / "heldout.txt").read_bytes()[: options.score_bytes]

    start, rows = time.perf_counter(), []
    for folder, name, recorded in MODELS:
        model, tokenizer = hadamoe.load(str(HERE / folder), dtype="float32")
        print(f"\n\033[1m{name}\033[0m" if sys.stdout.isatty() else f"\n{name}")
        print(options.prompt, end="", flush=True)
        done = torch_run.stream(
            model,
            tokenizer,
            options.prompt,
            max_tokens=options.tokens,
            on_text=lambda text: print(text, end="", flush=True),
        )
        print()
        score = torch_run.bits_per_byte(model, heldout)
        size = sum(f.stat().st_size for f in (HERE / folder).glob("*.safetensors"))
        bits = inspect.describe(HERE / folder).bits_per_weight
        rows.append((name, size, bits, done.decode_rate, score, recorded))

    source = rows[0][4]
    heads = ("format", "MB", "bits/weight", "tok/s", "bits/byte", "- BF16", "recorded")
    print("\n{:32} {:>6} {:>12} {:>7} {:>10} {:>8} {:>9}".format(*heads))
    for name, size, bits, rate, score, recorded in rows:
        print(f"{name:32} {size / 1e6:6.2f} {bits:12.2f} {rate:7.0f}", end="")
        print(f" {score:10.4f} {score - source:+8.4f} {recorded:9.4f}")
    print(f"\n{len(heldout):,} bytes the model has not seen, in windows of 1,024.")
    print("recorded: transformers in f32 on weights decoded independently, all 16,384 bytes.")
    print(
        f"{time.perf_counter() - start:.0f} s in all, {hadamoe.isa()}, {hadamoe.threads()} threads"
    )


if __name__ == "__main__":
    main()
