"""Checkpoints with one thing wrong: each is refused by name, file, tensor, expected and found."""

from __future__ import annotations

import contextlib
import math
import os
import shutil

import numpy as np
import pytest
from bend import (
    CT,
    F32,
    HF,
    JANG,
    ML,
    MLX,
    MX,
    TQ,
    broken,
    change,
    config,
    copy_of,
    drop,
    drop_all,
    poke,
    put,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import checkpoint

from hadamoe import FormatError, UnsupportedError, formats
from hadamoe.checkpoint import DTYPES
from hadamoe.formats.config import geometry, normalise

#: (checkpoint, what is done to it, message after the directory's path)
FORMAT_ERRORS = {
    "extra tensor": (
        MLX, put(f"{ML}.0.mlp.bonus", np.zeros((2, 3), F32)),
        f"/model.safetensors: {ML}.0.mlp.bonus: expected only tensors of this architecture, "
        "found one more, F32 [2, 3]",
    ),
    "a ninth expert": (
        CT, put(f"{HF}.0.mlp.experts.8.down_proj.weight", np.zeros((256, 128), np.uint16)),
        f"/model.safetensors: {HF}.0.mlp.experts.8.down_proj.weight: expected only tensors of this "
        "architecture, found one more, BF16 [256, 128]",
    ),
    "a bias": (
        TQ, put(f"{HF}.3.self_attn.q_proj.bias", np.zeros(512, np.float16)),
        f"/model.safetensors: {HF}.3.self_attn.q_proj.bias: expected only tensors of this "
        "architecture, found one more, F16 [512]",
    ),
    "unknown MTP tensor": (
        TQ, put("mtp.bogus.weight", np.zeros(2, np.float16)),
        "/model.safetensors: mtp.bogus.weight: expected only tensors of this architecture, "
        "found one more, F16 [2]",
    ),
    "one meaning, two names": (
        TQ, put("model.layers.0.mlp.gate.weight", np.zeros((8, 256), np.float16)),
        ": model.layers.0.mlp.gate.weight: expected one tensor of this meaning, "
        f"found also {HF}.0.mlp.gate.weight",
    ),
    "missing norm": (
        MLX, drop(f"{ML}.3.input_layernorm.weight"),
        ": layers.3.input_layernorm.weight: expected a tensor, found none",
    ),
    "missing weight": (
        TQ, drop(f"{HF}.0.linear_attn.in_proj_b.weight"),
        ": layers.0.linear_attn.in_proj_b: expected a weight of [4, 256], found none",
    ),
    "missing experts": (
        CT, drop_all("layers.2.mlp.experts.0.up"),
        ": layers.2.mlp.experts.up_proj: expected a weight of [8, 128, 256], found none",
    ),
    "one expert missing": (
        CT, drop(f"{HF}.0.mlp.experts.6.up_proj.weight"),
        ": layers.0.mlp.experts.6.up_proj: expected a weight of [128, 256], found none",
    ),
    "missing biases": (
        MLX, drop(f"{ML}.0.mlp.switch_mlp.up_proj.biases"),
        ": layers.0.mlp.experts.up_proj.biases: expected a tensor, found none",
    ),
    "missing norms of codes": (
        JANG, drop(f"{ML}.1.mlp.switch_mlp.down_proj.tq_norms"),
        ": layers.1.mlp.experts.down_proj.tq_norms: expected a tensor, found none",
    ),
    "missing scale": (
        CT, drop(f"{HF}.2.mlp.experts.3.up_proj.weight_scale"),
        ": layers.2.mlp.experts.3.up_proj.weight_scale: expected a tensor, found none",
    ),
    "wrong dtype of codes": (
        MLX, put("language_model.lm_head.weight", np.zeros((512, 64), F32)),
        "/model.safetensors: language_model.lm_head.weight: expected dtype U32, found F32",
    ),
    "rows": (
        MLX, change(f"{ML}.0.self_attn.q_proj.weight".replace(".0.", ".3."), lambda a: a[:-1]),
        f"/model.safetensors: {ML}.3.self_attn.q_proj.weight: expected shape [512, any], "
        "found [511, 32]",
    ),
    "bits that do not divide": (
        MLX, change(f"{ML}.2.linear_attn.in_proj_z.weight", lambda a: a[:, :-1]),
        f"/model.safetensors: {ML}.2.linear_attn.in_proj_z.weight: expected 16, 24, 32, 40, 48, 64 "
        "words in a row of 256 columns, found 31",
    ),
    "7 bits": (
        MLX, change(f"{ML}.2.linear_attn.in_proj_z.weight", lambda a: np.tile(a, (1, 2))[:, :56]),
        f"/model.safetensors: {ML}.2.linear_attn.in_proj_z.weight: expected bits in "
        "(2, 3, 4, 5, 6, 8), found 7 (56 words for 256 columns)",
    ),
    "group of 256": (
        MLX, change("language_model.lm_head.scales", lambda a: a[:, :1]),
        "/model.safetensors: language_model.lm_head.scales: expected a group in (32, 64, 128), "
        "found 256 (1 groups)",
    ),
    "groups that do not divide": (
        MLX, change("language_model.lm_head.scales", lambda a: a[:, :3]),
        "/model.safetensors: language_model.lm_head.scales: expected a divisor of 256 columns as "
        "groups, found 3",
    ),
    "biases of another shape": (
        MLX, change("language_model.lm_head.biases", lambda a: a[:, :2]),
        "/model.safetensors: language_model.lm_head.biases: expected shape [512, 4], found [512, "
        "2]",
    ),
    "biases of another dtype": (
        MLX, put("language_model.lm_head.biases", np.zeros((512, 4), F32)),
        "/model.safetensors: language_model.lm_head.biases: expected dtype BF16, found F32",
    ),
    "NaN scale": (
        MLX, change("language_model.lm_head.scales", poke(0x7FC0, 3, 1)),
        "/model.safetensors: language_model.lm_head.scales: expected finite numbers, "
        "found nan at [3, 1]",
    ),
    "Inf bias": (
        MLX, change(f"{ML}.1.mlp.switch_mlp.up_proj.biases", poke(0xFF80, 7, 0, 2)),
        f"/model.safetensors: {ML}.1.mlp.switch_mlp.up_proj.biases: expected finite numbers, "
        "found -inf at [7, 0, 2]",
    ),
    "NaN norm of a row": (
        JANG, change(f"{ML}.1.mlp.switch_mlp.down_proj.tq_norms", poke(np.nan, 2, 5)),
        f"/model.safetensors: {ML}.1.mlp.switch_mlp.down_proj.tq_norms: expected finite numbers, "
        "found nan at [2, 5]",
    ),
    "NaN norm of a group": (
        TQ, change(f"{HF}.3.self_attn.o_proj.weight.tq_norms", poke(np.inf, 9, 1)),
        f"/model.safetensors: {HF}.3.self_attn.o_proj.weight.tq_norms: expected finite numbers, "
        "found inf at [9, 1]",
    ),
    "NaN scale of an expert": (
        CT, change(f"{HF}.3.mlp.experts.5.up_proj.weight_scale", poke(0xFFC1, 0, 0)),
        f"/model.safetensors: {HF}.3.mlp.experts.5.up_proj.weight_scale: expected finite numbers, "
        "found nan at [0, 0]",
    ),
    "NaN layer norm": (
        CT, change(f"{HF}.1.input_layernorm.weight", poke(0x7FC0, 0)),
        f"/model.safetensors: {HF}.1.input_layernorm.weight: expected finite numbers, "
        "found nan at [0]",
    ),
    "E8M0 255": (
        MX, change(f"{ML}.4.mlp.switch_mlp.gate_proj.scales", poke(255, 1, 2, 3)),
        f"/model.safetensors: {ML}.4.mlp.switch_mlp.gate_proj.scales: expected E8M0 bytes 0 to "
        "254, "
        "found 255 at [1, 2, 3]",
    ),
    "MXFP4 with biases": (
        MX, put(f"{ML}.0.mlp.shared_expert.up_proj.biases", np.zeros((128, 8), np.uint8)),
        f"/model.safetensors: {ML}.0.mlp.shared_expert.up_proj.scales: expected MXFP4: 4 bits, "
        "group 32, no biases, found 4 bits, group 32",
    ),
    "two conv layouts": (
        MLX, change(f"{ML}.4.linear_attn.conv1d.weight", lambda a: a.transpose(0, 2, 1)),
        ": layers.4.linear_attn.conv1d.weight: expected one conv1d layout, "
        "found another in layers.0.linear_attn.conv1d.weight",
    ),
    "conv kernel": (
        CT, config(linear_conv_kernel_dim=3),
        f"/model.safetensors: {HF}.0.linear_attn.conv1d.weight: expected shape [256, 1, 3] or "
        "[256, 3, 1], found [256, 1, 4]",
    ),
    "JANGTQ bits against shape": (
        JANG, put(f"{ML}.0.mlp.switch_mlp.up_proj.tq_bits", np.array([4], np.uint8)),
        f"/model.safetensors: {ML}.0.mlp.switch_mlp.up_proj.tq_packed: expected 16 words in a "
        "row of "
        "128 columns, 4 bits, found 8",
    ),
    "JANGTQ words without tq_bits": (
        JANG, lambda ck: (drop(f"{ML}.0.mlp.switch_mlp.up_proj.tq_bits")(ck), change(
            f"{ML}.0.mlp.switch_mlp.up_proj.tq_packed", lambda a: a[..., :7])(ck)),
        f"/model.safetensors: {ML}.0.mlp.switch_mlp.up_proj.tq_packed: expected 8 or 16 words in a "
        "row of 128 columns, found 7",
    ),
    "JANGTQ 5 bits": (
        JANG, put(f"{ML}.0.mlp.switch_mlp.up_proj.tq_bits", np.array([5], np.uint8)),
        f"/model.safetensors: {ML}.0.mlp.switch_mlp.up_proj.tq_bits: expected bits in (2, 4), "
        "found 5",
    ),
    "JANGTQ bits as a float": (
        JANG, put(f"{ML}.0.mlp.switch_mlp.up_proj.tq_bits", np.array([2], F32)),
        f"/model.safetensors: {ML}.0.mlp.switch_mlp.up_proj.tq_bits: expected one integer, "
        "found F32 [1]",
    ),
    "JANGTQ seed": (
        JANG, lambda ck: ck.json["jang_config.json"].update(mxtq_seed="x"),
        "/jang_config.json: mxtq_seed: expected an integer 0 to 2^64-1, found 'x'",
    ),
    "TQ format": (
        TQ, lambda ck: ck.json["tq_config.json"].update(format="tq4"),
        "/tq_config.json: format: expected 'tq3_native', found 'tq4'",
    ),
    "TQ group of 40 bytes": (
        TQ, put(f"{HF}.0.linear_attn.in_proj_a.weight.tq_packed", np.zeros((8, 40), np.uint8)),
        f"/model.safetensors: {HF}.0.linear_attn.in_proj_a.weight.tq_packed: expected 32, 48 or 64 "
        "bytes in a group (2, 3 or 4 bits), found 40",
    ),
    "TQ rows": (
        TQ, change(f"{HF}.0.mlp.experts.down_proj.tq_packed", lambda a: a[:-1]),
        f"/model.safetensors: {HF}.0.mlp.experts.down_proj.tq_packed: expected shape [2048, any], "
        "found [2047, 64]",
    ),
    "TQ norms": (
        TQ, change(f"{HF}.0.mlp.experts.down_proj.tq_norms", lambda a: a.reshape(-1)),
        f"/model.safetensors: {HF}.0.mlp.experts.down_proj.tq_norms: expected shape [2048, 1], "
        "found [2048]",
    ),
    "weight_shape": (
        CT, put(f"{HF}.3.self_attn.o_proj.weight_shape", np.array([256, 255])),
        f"/model.safetensors: {HF}.3.self_attn.o_proj.weight_shape: expected [256, 256], "
        "found [256, 255]",
    ),
    "CT words": (
        CT, change(f"{HF}.3.self_attn.o_proj.weight_packed", lambda a: a[:, :-1]),
        f"/model.safetensors: {HF}.3.self_attn.o_proj.weight_packed: expected ceil(256 * bits / "
        "32) "
        "words in a row, bits 2 to 8, found 63",
    ),
    "CT scales": (
        CT, change(f"{HF}.3.self_attn.o_proj.weight_scale", lambda a: a[:-1]),
        f"/model.safetensors: {HF}.3.self_attn.o_proj.weight_scale: expected shape [256, groups] "
        "or "
        "[1], found [255, 2]",
    ),
    "CT groups": (
        CT, change(f"{HF}.3.self_attn.o_proj.weight_scale", lambda a: np.tile(a, (1, 2))[:, :3]),
        f"/model.safetensors: {HF}.3.self_attn.o_proj.weight_scale: expected a divisor of 256 "
        "columns "
        "as groups, found 3",
    ),
    "CT zero points in a symmetric checkpoint": (
        CT, put(f"{HF}.3.self_attn.k_proj.weight_zero_point", np.zeros((32, 2), np.int32)),
        f"/model.safetensors: {HF}.3.self_attn.k_proj.weight_zero_point: expected zero points of 0 "
        "(the config is symmetric), found others",
    ),
    "KV scale of a shape": (
        CT, put(f"{HF}.3.self_attn.k_scale", np.zeros((2, 2), F32)),
        f"/model.safetensors: {HF}.3.self_attn.k_scale: expected one number or [2, 1, 1], "
        "found F32 [2, 2]",
    ),
    "vision patch": (
        JANG, change("vision_tower.patch_embed.proj.weight", lambda a: a[..., :2]),
        "/model.safetensors: vision_tower.patch_embed.proj.weight: expected floats of "
        "[64, 3, 2, 16, 16] or [64, 2, 16, 16, 3], found F16 [64, 2, 16, 16, 2]",
    ),
    "hidden size": (
        MLX, config(hidden_size=512),
        f"/model.safetensors: {ML}.0.input_layernorm.weight: expected shape [512], found [256]",
    ),
    "no hidden size": (
        MLX, lambda ck: ck.config["text_config"].pop("hidden_size"),
        "/config.json: hidden_size: expected an integer from 1 to 16777216, found nothing",
    ),
    "layers": (
        MLX, config(num_hidden_layers=10**12),
        "/config.json: num_hidden_layers: expected an integer from 1 to 4096, found 1000000000000",
    ),
    "a layer less": (
        TQ, config(num_hidden_layers=3, layer_types=["linear_attention"] * 3),
        f"/model.safetensors: {HF}.3.mlp.experts.down_proj.tq_norms: expected only tensors of this "
        "architecture, found one more, F32 [2048, 1]",
    ),
    "layer types": (
        TQ, config(layer_types=["mamba"] * 4),
        "/config.json: layer_types: expected 4 of linear_attention or full_attention, "
        "found ['mamba', 'mamba', 'mamba', 'mamba']",
    ),
    "experts as a string": (
        TQ, config(num_experts="8"),
        "/config.json: num_experts: expected an integer from 1 to 65536, found '8'",
    ),
    "true for a size": (
        TQ, config(num_experts_per_tok=True),
        "/config.json: num_experts_per_tok: expected an integer from 1 to 65536, found True",
    ),
    "more than all experts": (
        TQ, config(num_experts_per_tok=9),
        "/config.json: num_experts_per_tok: expected at most num_experts 8, found 9",
    ),
    "heads": (
        TQ, config(num_key_value_heads=3),
        "/config.json: num_attention_heads: expected a multiple of 3, found 4",
    ),
    "text_config": (
        TQ, config(text_config=[]),
        "/config.json: text_config: expected an object, found []",
    ),
    "rope": (
        TQ, config(rope_parameters={"rope_type": "default"}),
        "/config.json: rope_theta: expected a number above 0, found nothing",
    ),
    "mrope": (
        TQ, config(rope_parameters={"rope_theta": 1e4, "mrope_section": "x"}),
        "/config.json: mrope_section: expected a list of sizes, found 'x'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", FORMAT_ERRORS)
def test_format_error(attack, tmp_path):
    path, message = broken(FORMAT_ERRORS, attack, tmp_path)
    with pytest.raises(FormatError) as e:
        formats.read(path)
    assert str(e.value) == f"{path}{message}"
    assert e.value.expected in message
    assert e.value.found in message


def test_big_checkpoints_are_verified_on_demand(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "VERIFY_AT_ONCE", 0)
    path, message = broken(FORMAT_ERRORS, "E8M0 255", tmp_path)
    model = formats.read(path)
    assert model.scale_bytes() > 0
    with pytest.raises(FormatError) as e:
        model.verify()
    assert str(e.value) == f"{path}{message}"


FUZZ = int(os.environ.get("HADAMOE_FUZZ", "300"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=6,
)


@settings(max_examples=FUZZ, deadline=None)
@given(data=st.data())
def test_fuzz_config(data):
    """A config with any value anywhere gives sizes, FormatError or UnsupportedError."""
    config = copy_of(JANG).config
    for _ in range(data.draw(st.integers(1, 3))):
        level = data.draw(
            st.sampled_from([config, config.get("text_config"), config.get("vision_config")])
        )
        if isinstance(level, dict) and level:
            level[data.draw(st.sampled_from(sorted(level)))] = data.draw(JSON)
    with contextlib.suppress(FormatError, UnsupportedError):
        geometry(normalise(config, checkpoint(JANG) / "config.json"), checkpoint(JANG))


@settings(max_examples=FUZZ // 4, deadline=None)
@given(data=st.data())
def test_fuzz_tensors(data, tmp_path_factory):
    """Any tensor may have any dtype and shape, or be gone: only our errors, no crash."""
    ck = copy_of(data.draw(st.sampled_from([JANG, TQ, CT, MX])))
    for _ in range(data.draw(st.integers(1, 3))):
        tensor = data.draw(st.sampled_from(sorted(ck.tensors)))
        kind, shape, _ = ck.tensors.pop(tensor)
        if data.draw(st.booleans()):
            kind = data.draw(st.sampled_from([kind, "F32", "U8", "I32", "I64", "BF16", "BOOL"]))
            sizes = st.sampled_from([*shape, 0, 1, 2, 3, 8, 128])
            small = st.lists(sizes, max_size=4).filter(lambda s: math.prod(s) < 1 << 20)
            shape = tuple(data.draw(small))
            ck.tensors[tensor] = (kind, shape, bytes(math.prod(shape) * DTYPES[kind].itemsize))
    path = tmp_path_factory.mktemp("fuzz")
    with contextlib.suppress(FormatError, UnsupportedError):
        formats.read(ck.write(path)).verify()
    shutil.rmtree(path)
