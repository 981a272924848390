"""Arrays packed by the formats' own tools, through a file and a reader, decode exactly."""

from __future__ import annotations

import json

import numpy as np
import pytest
from raw_checkpoint import stored, values, write_shard
from recorded import golden

from hadamoe import reference
from hadamoe.checkpoint import Checkpoint
from hadamoe.formats import compressed_tensors, jangtq, mlx, tq
from hadamoe.formats.names import Files
from hadamoe.weight import Instance, Part, Weight


def read(module, tmp_path, tensors, rows, columns, experts=None, config=None):
    """Write the tensors of one module "m" to a file and read its weight."""
    write_shard(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(config or {}))
    files = Files(Checkpoint.open(tmp_path))
    weight = module.reader(files)("m", rows, columns, experts)
    assert files.checkpoint.unclaimed() == []
    return weight


def bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def close(y, want):
    """Within rounding of f32 weights; the products are in f64."""
    assert np.abs(y - want).max() <= 3e-6 * np.abs(want).max()


@pytest.mark.parametrize("case", ["f32_g32", "bf16_g32", "bf16_g64", "bf16_g128", "f16_g64"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_affine(bits, case, tmp_path):
    g = golden(f"affine_b{bits}")
    kind = {"f32": "F32", "f16": "F16", "bf16": "BF16"}[case.split("_")[0]]
    packed, scales, biases, codes = (
        g[f"{k}_{case}"] for k in ("packed", "scales", "biases", "codes")
    )
    tensors = {
        "m.weight": stored(packed),
        "m.scales": stored(scales, kind),
        "m.biases": stored(biases, kind),
    }
    rows, columns = codes.shape
    w = read(mlx, tmp_path, tensors, rows, columns)
    group = int(case.split("g")[1])
    assert w.instances() == {Instance("linear", bits, kind.lower())}
    assert w.parts[0][0].group == group
    wide = {"F32": lambda a: a, "F16": lambda a: a.view("f2").astype("f4"), "BF16": bf16}[kind]
    s, b = (np.repeat(wide(a), group, axis=1) for a in (scales, biases))
    np.testing.assert_array_equal(values(w), s * codes.astype(np.float32) + b)
    if f"mlx_dequant_{case}" in g:
        np.testing.assert_array_equal(values(w), g[f"mlx_dequant_{case}"])
    close(g["x"] @ values(w).astype(np.float64).T, g[f"y_f64_{case}"])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_bit_stream(bits):
    g = golden("affine_packing")
    words = np.ascontiguousarray(g[f"words_b{bits}"])
    ones = np.ones((1, 1), np.float32)
    part = Part(Instance("linear", bits, "f32"), 1, 64, words.view(np.uint8)[None], ones, 0 * ones)
    np.testing.assert_array_equal(reference.part_values(part, 64)[0], g[f"codes_b{bits}"])


def test_mxfp4_of_mlx(tmp_path):
    g = golden("mxfp4_mlx_bf16")
    tensors = {"m.weight": stored(g["packed"]), "m.scales": stored(g["scales"])}
    w = read(mlx, tmp_path, tensors, *g["dequant"].shape)
    assert w.instances() == {Instance("e2m1", 4, "e8m0")}
    np.testing.assert_array_equal(values(w), g["dequant"])
    close(g["x"] @ values(w).astype(np.float64).T, g["y_f64"])


def test_mxfp4_of_gguf():
    """No checkpoint has these blocks; the ops take them."""
    g = golden("mxfp4_gguf_blocks")
    blocks = g["blocks"]
    part = Part(Instance("e2m1_gguf", 4, "e8m0"), len(blocks), 32, blocks)
    np.testing.assert_array_equal(values(Weight(256, ((part,),))), g["dequant"])


def test_mxfp4_of_gpt_oss():
    g = golden("mxfp4_gptoss")
    e, r, groups, _ = g["blocks"].shape
    parts = tuple(
        (Part(Instance("e2m1", 4, "e8m0"), r, 32, b.reshape(r, -1), s),)
        for b, s in zip(g["blocks"], g["scales"], strict=True)
    )
    w = Weight(32 * groups, parts)
    for i in range(e):
        np.testing.assert_array_equal(values(w, i), g["dequant_EKR"][i].T)


@pytest.mark.parametrize("case", ["512_b2", "512_b4", "768_b2"])
def test_jangtq(case, tmp_path):
    g = golden(f"jangtq_in{case}")
    columns, bits = int(case.split("_")[0]), int(case[-1])
    tensors = {
        "m.tq_packed": stored(g["packed"]),
        "m.tq_norms": stored(g["norms"]),
        "m.tq_bits": stored(np.array([bits], np.uint8)),
    }
    w = read(jangtq, tmp_path, tensors, len(g["packed"]), columns)
    assert w.instances() == {Instance("codebook", bits, "f16")}
    np.testing.assert_array_equal(w.parts[0][0].codebook, g["codebook"])
    rotated = reference.hadamard(g["x"], pre=w.rotation.pre)
    np.testing.assert_array_equal(rotated, g["x_rot"])
    close(values(w), g["w_hat"])
    y = rotated.astype(np.float64) @ reference.dequantize(w, np.arange(w.rows)).astype(np.float64).T
    close(y, g["y"])


@pytest.mark.parametrize(
    "case", ["edge8x256_b3", "edge8x256_b4", "w16x300_pad384_b3", "w64x512_b4"]
)
def test_tq(case, tmp_path):
    g = golden(f"tqvllm_{case}")
    tensors = {"m.tq_packed": stored(g["packed"]), "m.tq_norms": stored(g["norms"])}
    rows, columns = g["w_hat"].shape
    w = read(tq, tmp_path, tensors, rows, columns)
    assert (w.columns, w.in_features) == (-(-columns // 128) * 128, columns)
    close(values(w), g["w_hat"])
    rotated = reference.hadamard(g["x"], block=128, pre=w.rotation.pre, post=w.rotation.post)
    y = rotated.astype(np.float64) @ reference.dequantize(w, np.arange(rows)).astype(np.float64).T
    close(y, g["y_ref_f64"])


def test_tq_experts(tmp_path):
    g = golden("tqvllm_experts4x64x512_b3")
    tensors = {"m.tq_packed": stored(g["packed"]), "m.tq_norms": stored(g["norms"])}
    w = read(tq, tmp_path, tensors, 64, 512, 4)
    assert (w.experts, w.rows) == (4, 64)
    y = g["x"] @ np.concatenate([values(w, e) for e in range(4)]).astype(np.float64).T
    close(y, g["y_ref_f64"])


@pytest.mark.parametrize(
    "case", ["int4_g32_asym_256x512", "int4_channel_oddK_16x43", "int8_channel_oddK_16x40"]
)
def test_compressed_tensors(case, tmp_path):
    g = golden(f"w4a16_{case}")
    tensors = {
        "m.weight_packed": stored(g["weight_packed"]),
        "m.weight_scale": stored(g["weight_scale_bf16u16"]),
        "m.weight_shape": stored(g["weight_shape"]),
    }
    if "weight_zero_point_packed" in g:
        tensors["m.weight_zero_point"] = stored(g["weight_zero_point_packed"])
    rows, columns = g["q_int8"].shape
    w = read(compressed_tensors, tmp_path, tensors, rows, columns)
    scale = bf16(g["weight_scale_bf16u16"])
    zero = g.get("zero_point_int8", np.zeros_like(scale))
    group = columns // scale.shape[1]
    q = g["q_int8"].astype(np.float32) - np.repeat(zero, group, 1).astype(np.float32)
    np.testing.assert_array_equal(values(w), q * np.repeat(scale, group, 1))
    table = "linear" if "zero_point_int8" in g else "linear_signed"
    assert {i.table for i in w.instances()} == {table}
    close(bf16(g["x_bf16u16"]) @ values(w).astype(np.float64).T, g["y_exact_f64"])
