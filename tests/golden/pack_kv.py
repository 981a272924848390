"""Keeps of the recorded key and value codecs what the tests read: fewer tokens, one head.

python tests/golden/pack_kv.py SOURCE_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

OUT = Path(__file__).parent
Arrays = dict[str, np.ndarray]

# recorded ties: a rotated number this near to the middle of two centroids may take either
TIE = 2e-6


def swift(z: Arrays) -> Arrays:
    """mlx-swift-lm's turbo4 keys and turbo2 values: 128 tokens, rows decoded for 16 of them."""
    kept = {k: z[k] for k in ("k_codebook", "v_codebook", "k_boundaries", "v_boundaries")}
    kept["heavy_stretch"] = z["heavy_calib_scale"]
    for kind in ("gauss", "heavy"):
        for side, source in (("k", "uncal_k"), ("v", "v")):
            name = f"{kind}_{side}"
            kept[f"{name}_x"] = z[f"{kind}_{side.upper()}"][0, :128]
            kept[f"{name}_words"] = z[f"{kind}_{source}_packed"][0, :128]
            kept[f"{name}_norms"] = z[f"{kind}_{source}_norm"][0, :128]
            kept[f"{name}_rows"] = z[f"{kind}_{source}hat"][0, :16]
            kept[f"{name}_ties"] = np.argwhere(z[f"{kind}_{source}_margin"][0, :128] < TIE)
    for key, source in (("words", "packed"), ("norms", "norm")):
        kept[f"heavy_stretched_{key}"] = z[f"heavy_cal_k_{source}"][0, :16]
    kept["heavy_stretched_rows"] = z["heavy_cal_khat"][0, :16]
    return kept


def hkv(z: Arrays, tokens: int) -> Arrays:
    """Our own codecs' prototype: one head; what attention gave where all its tokens are kept."""
    kept = {k: z[k] for k in ("k_codebook", "v_codebook", "k_kappa", "v_kappa")}
    for kind in ("gauss", "heavy"):
        for side in "kv":
            kept[f"{kind}_{side}_x"] = z[f"{kind}_{side.upper()}"][0, :tokens]
        for mode in ("plain", "calib"):
            for side in "kv":
                name = f"{kind}_{mode}_{side}"
                kept[f"{name}_words"] = z[f"{name}0_packed"][:tokens]
                kept[f"{name}_nu"] = z[f"{name}0_nu"][:tokens]
            heads = len(z[f"{kind}_Q"]) // 2
            kept[f"{kind}_{mode}_scores"] = z[f"{kind}_{mode}_int_scores"][:heads, 3, :tokens]
            if tokens == 300:
                kept[f"{kind}_{mode}_y"] = z[f"{kind}_{mode}_out_decode_wiener"][:heads]
        kept[f"{kind}_q"] = z[f"{kind}_Q"][:heads, 3]
        kept[f"{kind}_mean"] = z[f"{kind}_calib_k0_mu"]
        kept[f"{kind}_balance"] = z[f"{kind}_calib_k0_bal"]
    return kept


def affine(z: Arrays) -> Arrays:
    """mx.quantize of bf16 rows; bf16 numbers as their bits."""
    kept = {}
    for kind in ("gauss", "heavy"):
        x = z[f"d256_{kind}_x"][:64]
        kept[f"{kind}_x"] = ((x.view("u4") + 0x7FFF + (x.view("u4") >> 16 & 1)) >> 16).astype("u2")
        for bits in (4, 8):
            name = f"d256_{kind}_bf16_b{bits}"
            kept[f"{kind}_words{bits}"] = z[f"{name}_wq"][:64]
            for key in ("scales", "biases", "xhat"):
                kept[f"{kind}_{key}{bits}"] = (z[f"{name}_{key}"][:64].view("u4") >> 16).astype(
                    "u2"
                )
    return kept


def fp8(z: Arrays) -> Arrays:
    """torch's cast to E4M3."""
    kept = {k: z[k] for k in ("codes", "values", "ties_x", "ties_bytes_satfinite")}
    for kind in ("heavy", "edge"):
        kept[f"{kind}_x"] = z[f"d256_{kind}_x"][:16]
        for scale in ("1.0", "0.5", "0.03125"):
            kept[f"{kind}_{scale}"] = z[f"d256_{kind}_s{scale}_bytes"][:16]
    return kept


def kivi(z: Arrays) -> Arrays:
    """KIVI of 64 tokens."""
    kept = {}
    for kind in ("gauss", "heavy"):
        for side in "kv":
            kept[f"{kind}_{side}_x"] = z[f"{kind}_{side.upper()}"][:64]
            for bits in (2, 4):
                kept[f"{kind}_{side}{bits}_codes"] = z[f"{kind}_{side}{bits}_codes"][:64]
                for key in ("scale", "min"):
                    a = z[f"{kind}_{side}{bits}_{key}"]
                    kept[f"{kind}_{side}{bits}_{key}"] = a[: 2 if side == "k" else 64]
    return kept


def ggml(z: Arrays) -> Arrays:
    """turbo4 of a llama.cpp fork whose codebook is wrong."""
    return {"x": z["d128_gauss_x"], "rows": z["d128_gauss_xhat"]}


FILES = {
    "kv_swift": ("kv_swift_turbo4v2_d128", swift),
    "kv_hkv_k4v3": ("kv_hkv_k4v3_d128", lambda z: hkv(z, 300)),
    "kv_hkv_k4v2": ("kv_hkv_k4v2_d256", lambda z: hkv(z, 64)),
    "kv_affine": ("kv_affine_g64_mlx", affine),
    "kv_fp8": ("kv_fp8_e4m3", fp8),
    "kv_kivi": ("kv_kivi_d256", kivi),
    "kv_ggml": ("kv_ggml_turbo4_69d8e4be4", ggml),
}


def main(source: Path) -> None:
    for name, (original, keep) in FILES.items():
        with np.load(source / f"{original}.npz") as z:
            np.savez_compressed(OUT / f"{name}.npz", **keep(dict(z)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
