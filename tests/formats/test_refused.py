"""Layouts hadamoe does not read are refused by name."""

from __future__ import annotations

import numpy as np
import pytest
from bend import CT, F32, HF, JANG, ML, MX, TQ, broken, config, put
from raw_checkpoint import stored

from hadamoe import UnsupportedError, formats

UNSUPPORTED = {
    "MXFP8": (
        MX, lambda ck: ck.tensors.update({
            f"{ML}.0.mlp.shared_expert.up_proj.weight": stored(np.zeros((128, 64), np.uint32)),
        }),
        f"/model.safetensors: {ML}.0.mlp.shared_expert.up_proj.scales: "
        "MXFP8 is not supported; MXFP4 is",
    ),
    "NVFP4": (
        MX, lambda ck: ck.tensors.update({
            f"{ML}.0.mlp.shared_expert.up_proj.scales": stored(np.zeros((128, 16), np.uint8)),
        }),
        f"/model.safetensors: {ML}.0.mlp.shared_expert.up_proj.scales: "
        "NVFP4 is not supported; MXFP4 is",
    ),
    "jang v2": (
        JANG, put("layers.0.mlp.experts.0.w1.tq2_packed", np.zeros(2, np.uint8)),
        ": jang's v2 layout (tq2_packed) is not supported; mxtq is",
    ),
    "JANGTQ 3 bits": (
        JANG, put(f"{ML}.0.mlp.switch_mlp.up_proj.tq_bits", np.array([3], np.uint8)),
        f"/model.safetensors: {ML}.0.mlp.switch_mlp.up_proj.tq_packed: JANGTQ's 3-bit layout is "
        "not "
        "supported; its own converter cannot produce it",
    ),
    "TQ group size": (
        TQ, lambda ck: ck.json["tq_config.json"].update(group_size=64),
        "/tq_config.json: group_size 64; hadamoe reads 128",
    ),
    "fused CT scales": (
        CT, put(f"{HF}.0.mlp.experts.gate_up_proj_scale", np.zeros(2, F32)),
        ": compressed-tensors fused experts' scales (repack_moe) (tensors *.gate_up_proj_scale)",
    ),
    "CT NVFP4": (
        CT, put(f"{HF}.0.mlp.gate.weight_global_scale", np.zeros(1, F32)),
        ": compressed-tensors NVFP4 (tensors *.weight_global_scale)",
    ),
    "CT int8 weights": (
        CT, put(f"{HF}.0.mlp.gate.weight", np.zeros(8 * 256, np.int8).reshape(8, 256), "I8"),
        ": compressed-tensors with I8 weights; hadamoe reads pack-quantized",
    ),
    "CT fp8 weights": (
        CT, put(f"{HF}.0.mlp.gate.weight", np.zeros((8, 256), np.uint8), "F8_E4M3"),
        ": compressed-tensors with F8_E4M3 weights; hadamoe reads pack-quantized",
    ),
    "CT MXFP4": (
        CT, put(f"{HF}.0.mlp.gate.weight_packed", np.zeros((8, 128), np.uint8)),
        ": compressed-tensors mxfp4-pack-quantized; hadamoe reads pack-quantized",
    ),
    "CT int-quantized": (
        CT, lambda ck: ck.config["quantization_config"].update(format="int-quantized"),
        ": compressed-tensors int-quantized; hadamoe reads pack-quantized",
    ),
    "CT g_idx": (
        CT, put(f"{HF}.3.self_attn.q_proj.weight_g_idx", np.arange(256, dtype=np.int32) % 2),
        f"/model.safetensors: {HF}.3.self_attn.q_proj.weight_g_idx: columns in another order than "
        "k // 128 (actorder=group)",
    ),
    "block-wise FP8": (
        "stdlib_bf16", put(f"{HF}.0.mlp.gate.weight_scale_inv", np.zeros(1, F32)),
        ": block-wise FP8 (tensors *.weight_scale_inv)",
    ),
    "another quant_method": (
        "stdlib_bf16", lambda ck: ck.config.update(quantization_config={"quant_method": "fp8"}),
        ": quant_method 'fp8' is not supported",
    ),
    "another model": (
        TQ, config(model_type="llama"),
        "/config.json: model_type 'llama'; hadamoe runs qwen3_5_moe and qwen3_5_moe_text",
    ),
    "attention bias": (
        TQ, config(attention_bias=True),
        "/config.json: attention_bias True; hadamoe runs False only",
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", UNSUPPORTED)
def test_unsupported(attack, tmp_path):
    path, message = broken(UNSUPPORTED, attack, tmp_path)
    with pytest.raises(UnsupportedError) as e:
        formats.read(path)
    assert str(e.value) == f"{path}{message}"
