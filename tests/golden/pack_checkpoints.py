"""Packs the tiny reference checkpoints of the peers' converters into tests/golden/checkpoints.

    python tests/golden/pack_checkpoints.py SOURCE_DIR

Tensors no test reads (MTP heads; vision towers without recorded features) keep name, shape and
dtype but repeat their first 4 KiB, so that they compress away. The archives are reproducible.
"""

from __future__ import annotations

import io
import json
import lzma
import sys
import tarfile
from pathlib import Path

import numpy as np

OUT = Path(__file__).parent / "checkpoints"
SENSELESS = {  # checkpoint -> name fragments of the tensors that are replaced
    "jangtq_tiny": (),
    "configi_tiny": (),
    "mxfp4_node_tiny": ("vision_tower",),
    "tqvllm_tiny": ("visual", "mtp."),
    "w4a16_tiny": ("visual", "mtp."),
}
KEYS = {
    "jangtq_tiny_logits": (
        "input_ids",
        "logits_hf_fp32_exact",
        "vision_pixel_values",
        "vision_grid_thw",
        "vision_features",
        "greedy16_from_first16_hf_roundednorms",
    ),
    "configi_tiny_logits": ("tokens", "logits_f32", "logits_decode_f32"),
    "configi_tiny_robust": ("tokens", "logits_f32", "logits_bf16"),
    "mxfp4_node_tiny_logits": ("tokens", "logits_f32", "logits_decode_f32"),
    "mxfp4_node_tiny_robust": ("tokens", "logits_f32", "logits_bf16"),
    "tqvllm_tiny_logits": ("ids", "ids40", "logits_hf_f32_tiny", "logits40_hf_f32_tiny"),
    "w4a16_tiny_logits": ("input_ids", "logits_fp32_wexact", "logits_decode_fp32_wexact"),
}


def flatten_tensors(data: bytes, fragments: tuple[str, ...]) -> bytes:
    """The safetensors file with every tensor whose name holds a fragment made repetitive."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    for name, info in header.items():
        if any(f in name for f in fragments):
            begin, end = info["data_offsets"]
            seed = bytes(body[begin : min(end, begin + 4096)])
            body[begin:end] = (seed * -(-(end - begin) // max(1, len(seed))))[: end - begin]
    return data[: 8 + size] + bytes(body)


def pack(source: Path, out: Path, fragments: tuple[str, ...]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for file in sorted(source.iterdir()):
            data = file.read_bytes()
            if file.suffix == ".safetensors":
                data = flatten_tensors(data, fragments)
            info = tarfile.TarInfo(f"{source.name}/{file.name}")
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    best = min(
        (
            lzma.compress(
                buffer.getvalue(),
                filters=[{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, **options}],
            )
            # two-byte alignment suits bf16, the default suits packed codes
            for options in ({}, {"lc": 0, "lp": 1, "pb": 1}, {"lc": 3, "lp": 1, "pb": 1})
        ),
        key=len,
    )
    out.write_bytes(best)
    print(f"{out.name}: {len(best):,} bytes")


def main(source: Path) -> None:
    OUT.mkdir(exist_ok=True)
    for name, fragments in SENSELESS.items():
        pack(source / name, OUT / f"{name}.tar.xz", fragments)
    for name, keys in KEYS.items():
        with np.load(source / f"{name}.npz") as z:
            np.savez_compressed(OUT / f"{name}.npz", **{k: z[k] for k in keys})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
