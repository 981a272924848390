"""Keeps of the peers' recorded arrays what the tests read.

python tests/golden/pack_formats.py SOURCE_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

OUT = Path(__file__).parent
_AFFINE = [
    f"{key}_{case}"
    for case in ("f32_g32", "bf16_g32", "bf16_g64", "bf16_g128", "f16_g64")
    for key in ("packed", "scales", "biases", "codes", "mlx_dequant", "y_f64")
    if key != "mlx_dequant" or case == "f32_g32"
]
_TQ = ("packed", "norms", "w_hat", "x", "y_ref_f64")
_JANG = ("packed", "norms", "codebook", "indices", "w_hat", "x", "x_rot", "y")
_CT = (
    "weight_packed", "weight_scale_bf16u16", "weight_shape", "q_int8", "dequant_bf16u16",
    "x_bf16u16", "y_exact_f64", "weight_zero_point_packed", "zero_point_int8",
)  # fmt: skip
KEYS: dict[str, tuple[str, ...] | list[str]] = {
    **{f"affine_b{b}": [*_AFFINE, "x"] for b in (2, 3, 4, 5, 6, 8)},
    "affine_packing": [f"{k}_b{b}" for b in (2, 3, 4, 5, 6, 8) for k in ("codes", "words")],
    "mxfp4_mlx_bf16": ("packed", "scales", "codes", "dequant", "x", "y_f64"),
    "mxfp4_gguf_blocks": ("blocks", "dequant", "x", "y_f64"),
    "mxfp4_gptoss": ("blocks", "scales", "dequant_EKR"),
    "jangtq_codebooks_signs": [
        *(f"codebook.{d}.{b}" for d in (64, 128, 512, 768, 2048) for b in (2, 3, 4)),
        *(f"signs.{d}.{seed}" for d in (64, 512, 768, 2048) for seed in (0, 7, 42)),
    ],
    **{f"jangtq_in{d}": _JANG for d in ("512_b2", "512_b4", "768_b2")},
    "jangtq_moe_h512_i128_e8_k2_b2_down4": (
        *(f"{p}_{k}" for p in ("gate", "up", "down") for k in ("packed", "norms", "bits")),
        "codebook_gate_up", "codebook_down", "signs_hidden", "signs_inter",
        "x", "indices", "scores", "y_combined",
    ),
    "tqvllm_edge8x256_b3": _TQ,
    "tqvllm_edge8x256_b4": _TQ,
    "tqvllm_w16x300_pad384_b3": _TQ,
    "tqvllm_w64x512_b4": _TQ,
    "tqvllm_experts4x64x512_b3": ("packed", "norms", "x", "y_ref_f64"),
    "w4a16_int4_g32_asym_256x512": _CT,
    "w4a16_int4_channel_oddK_16x43": _CT,
    "w4a16_int8_channel_oddK_16x40": _CT,
}  # fmt: skip


def main(source: Path) -> None:
    for name, keys in KEYS.items():
        with np.load(source / f"{name}.npz") as z:
            kept = {k: z[k] for k in keys if k in z.files}
        np.savez_compressed(OUT / f"{name}.npz", **kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
