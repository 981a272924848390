"""Whole checkpoints of every format: what is read is what the formats' own tools wrote."""

from __future__ import annotations

import json

import numpy as np
import pytest
from raw_checkpoint import Raw, same_weights, stored, values, write_shard
from recorded import STDLIB, TINY, checkpoint

from hadamoe import FormatError, Instance, formats
from hadamoe.formats.names import as_f32, canonical

FORMATS = {
    "configi_tiny": "mlx-affine",
    "jangtq_tiny": "jangtq",
    "mxfp4_node_tiny": "mxfp4",
    "tqvllm_tiny": "tq",
    "w4a16_tiny": "compressed-tensors",
    "stdlib_bf16": "bf16",
    "stdlib_configi": "mlx-affine",
    "stdlib_jangtq2": "jangtq",
    "stdlib_mxfp4": "mxfp4",
    "stdlib_tq_apex2": "tq",
    "stdlib_w4a16": "compressed-tensors",
}
#: relative Frobenius error of each width's converter on trained weights, with some room
LOSS = {2: 0.5, 3: 0.25, 4: 0.16, 5: 0.06, 6: 0.03, 8: 0.015}


@pytest.fixture(scope="module")
def raw(checkpoint):
    """A fresh in-memory copy of a checkpoint."""
    return lambda name: Raw.load(checkpoint(name))


@pytest.mark.parametrize("name", [*TINY, *STDLIB])
def test_every_tensor_is_claimed(name):
    model = formats.read(checkpoint(name))
    assert model.format == FORMATS[name]
    assert formats.detect(checkpoint(name)) == (model.format, model.evidence)
    assert model.checkpoint.unclaimed() == []
    assert model.notes == []
    assert model.tokenizer == (name != "w4a16_tiny")
    model.verify()


@pytest.mark.parametrize("name", [n for n in STDLIB if n != "stdlib_bf16"])
def test_one_model_in_every_format(name):
    """The same trained weights, each within its width's loss of bf16: names, order of gate and up,
    rotations, norms' offset and layouts are right."""
    source, model = formats.read(checkpoint("stdlib_bf16")), formats.read(checkpoint(name))
    text = {p for p in model.weights if not p.startswith("visual.")}
    assert text == source.weights.keys()
    for path, weight in model.weights.items():
        if path.startswith("visual."):
            continue
        for e in range(weight.experts):
            want, got = values(source.weights[path], e), values(weight, e)
            bits = min(p.instance.bits for p in weight.parts[e])
            loss = 0.002 if bits == 16 else LOSS[bits]
            assert np.linalg.norm(got - want) <= loss * np.linalg.norm(want), (path, e, bits)
    assert model.tensors.keys() == source.tensors.keys()
    for path, want in source.tensors.items():
        assert model.tensors[path].dtype == np.float32
        np.testing.assert_allclose(model.tensors[path], want, rtol=2**-7, atol=2**-8, err_msg=path)
    for path, want in source.vision.items() if model.vision else ():
        if path in model.vision:
            np.testing.assert_allclose(model.vision[path].f32(), want.f32(), rtol=2**-7, atol=2**-8)
        else:
            assert path.removesuffix(".weight") in model.weights


def test_mlx_decodes_the_same():
    """mlx.dequantize on the files' tensors, in f32: the same bits."""
    mx = pytest.importorskip("mlx.core")
    for name in ("configi_tiny", "mxfp4_node_tiny"):
        model = formats.read(checkpoint(name))
        stack = {canonical(n): n for n in model.checkpoint.names()}
        for path, weight in model.weights.items():
            if path.endswith("gate_up"):
                continue
            module = f"{path}_proj" if path.endswith("experts.down") else path
            if f"{module}.scales" not in stack:
                continue
            w, s = (model.checkpoint.tensor(stack[f"{module}.{n}"]) for n in ("weight", "scales"))
            if s.dtype == "U8":
                got = mx.dequantize(
                    mx.array(w.array), mx.array(s.array), group_size=32, bits=4, mode="mxfp4",
                    dtype=mx.float32,
                )  # fmt: skip
            else:
                b = model.checkpoint.tensor(stack[f"{module}.biases"])
                part = weight.parts[0][0]
                got = mx.dequantize(
                    mx.array(w.array), mx.array(as_f32(s)), mx.array(as_f32(b)),
                    group_size=part.group, bits=part.instance.bits,
                )  # fmt: skip
            want = np.stack([values(weight, e) for e in range(weight.experts)])
            np.testing.assert_array_equal(np.array(got).reshape(want.shape), want, err_msg=path)


def test_super_expert_has_its_own_width():
    w = formats.read(checkpoint("w4a16_tiny")).weights["layers.3.mlp.experts.down"]
    found = [str(expert[0].instance) for expert in w.parts]
    assert (
        found == ["linear_signed4/bf16"] * 5 + ["linear_signed8/bf16"] + ["linear_signed4/bf16"] * 2
    )
    layer0 = formats.read(checkpoint("w4a16_tiny")).weights["layers.0.mlp.experts.down"]
    assert layer0.instances() == {Instance("plain", 16, "bf16")}


def test_mtp_is_listed_and_unused():
    model = formats.read(checkpoint("tqvllm_tiny"))
    assert "mtp.fc.weight.tq_packed" in model.mtp
    assert not any("mtp" in p for p in [*model.weights, *model.tensors])


def test_patches_of_mlx_are_put_back():
    """Their [out, time, y, x, channels] is HF's [out, channels, time, y, x]."""
    model = formats.read(checkpoint("jangtq_tiny"))
    name = "vision_tower.patch_embed.proj.weight"
    array = model.checkpoint.tensor(name).array
    got = model.vision["visual.patch_embed.proj.weight"]
    assert got.array.shape == (64, 3, 2, 16, 16)
    np.testing.assert_array_equal(got.array[:, 2, 1], array[:, 1, :, :, 2])


# ---- names and layouts other writers use -------------------------------------------------------

PREFIXES = {
    "w4a16_tiny": [
        [("model.language_model.", "model.")],
        [("model.language_model.", "language_model.model."), ("lm_head", "language_model.lm_head"),
         ("model.visual.", "vision_tower.")],
    ],
    "tqvllm_tiny": [
        [("model.language_model.", "model.")],
        [("model.language_model.", ""), ("model.visual.", "visual.")],
        [(".weight.tq_", ".tq_")],
    ],
    "jangtq_tiny": [
        [("language_model.model.", "model.language_model.")],
        [("language_model.model.", "model."), ("language_model.lm_head", "lm_head")],
        [(".switch_mlp.", ".experts.")],
    ],
    "configi_tiny": [[("language_model.model.", "model."), ("language_model.lm_head", "lm_head")]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "number"), [(n, i) for n, v in PREFIXES.items() for i in range(len(v))]
)
def test_other_names(name, number, raw, tmp_path):
    model = formats.read(raw(name).rename(*PREFIXES[name][number]).write(tmp_path))
    source = formats.read(checkpoint(name))
    same_weights(model.weights, source.weights)
    assert model.vision.keys() == source.vision.keys()


def jang_per_expert(ck, old="mlp.switch_mlp.{}_proj", new="mlp.experts.{}.{}_proj", letters=None):
    """JANGTQ's stacked experts as single tensors."""
    for name in [n for n in ck.tensors if ".switch_mlp." in n]:
        head, _, rest = name.partition(".mlp.switch_mlp.")
        projection, leaf = rest.split(".")
        array = ck.array(name)
        del ck.tensors[name]
        for e in range(8):
            stem = f"{head}.mlp.experts.{e}.{projection}"
            if letters:
                stem = f"{head}.block_sparse_moe.experts.{e}.{letters[projection]}"
            ck.tensors[f"{stem}.{leaf}"] = stored(array if leaf == "tq_bits" else array[e])
    return ck


@pytest.mark.parametrize(
    "letters",
    [None, {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}],
    ids=["names", "w123"],
)
def test_jangtq_per_expert(letters, raw, tmp_path):
    ck = jang_per_expert(raw("jangtq_tiny"), letters=letters)
    same_weights(
        formats.read(ck.write(tmp_path)).weights, formats.read(checkpoint("jangtq_tiny")).weights
    )


def test_jangtq_fused_gate_up_other_integers_no_sidecar(raw, tmp_path):
    ck = raw("jangtq_tiny")
    ck.sidecars.clear()
    for name in [n for n in ck.tensors if ".gate_proj.tq_" in n]:
        up, fused = (
            name.replace(".gate_proj.", ".up_proj."),
            name.replace(".gate_proj.", ".gate_up_proj."),
        )
        both = [ck.array(name), ck.array(up)]
        del ck.tensors[name], ck.tensors[up]
        bits = name.endswith("tq_bits")
        ck.tensors[fused] = stored(
            np.int32(2).reshape(()) if bits else np.concatenate(both, axis=1)
        )
    for name in [n for n in ck.tensors if n.endswith("down_proj.tq_bits")]:
        del ck.tensors[name]
    same_weights(
        formats.read(ck.write(tmp_path)).weights, formats.read(checkpoint("jangtq_tiny")).weights
    )


def test_jangtq_shifted_norms_are_honoured(raw, tmp_path):
    ck = raw("jangtq_tiny")
    ck.config["jang_norms_pre_shifted"] = True
    path = "layers.0.input_layernorm"
    pre = formats.read(ck.write(tmp_path)).tensors[path]
    np.testing.assert_array_equal(formats.read(checkpoint("jangtq_tiny")).tensors[path], 1 + pre)


def test_jangtq_sidecar_wins_and_is_noted(raw, tmp_path):
    ck = raw("jangtq_tiny")
    ck.write(tmp_path)
    table = np.float32([-0.2, -0.05, 0.05, 0.21])
    sidecar = tmp_path / "jangtq_runtime.safetensors"
    write_shard(sidecar, {"codebook.128.2": stored(table)})
    model = formats.read(tmp_path)
    np.testing.assert_array_equal(
        model.weights["layers.0.mlp.experts.gate_up"].parts[0][0].codebook, table
    )
    assert model.notes == [
        "jangtq_runtime.safetensors: codebook.128.2 differs from the recomputed one; "
        "the file's is used"
    ]
    write_shard(sidecar, {"codebook.128.2": stored(table[:3])})
    assert formats.read(tmp_path).notes == [
        "jangtq_runtime.safetensors: codebook.128.2 has 3 numbers, needs 4: recomputed"
    ]
    write_shard(sidecar, {"codebook.128.2": stored(np.float32([0, np.nan, 1, 2]))})
    with pytest.raises(FormatError) as e:
        formats.read(tmp_path)
    assert str(e.value) == f"{sidecar}: codebook.128.2: expected finite numbers, found Inf or NaN"


def test_jangtq_conversion_without_codebooks_is_mlx_affine(raw, tmp_path):
    """From per-expert sources jang writes every expert as affine 8-bit, under the same "
    "weight_format."""
    ck, mlx = raw("jangtq_tiny"), pytest.importorskip("mlx.core")
    for name in [n for n in ck.tensors if n.endswith(".tq_packed")]:
        stem = name.removesuffix(".tq_packed")
        e, n, _ = ck.array(name).shape
        k = 64 if "down" in name else 128
        for leaf in ("tq_packed", "tq_norms", "tq_bits"):
            del ck.tensors[f"{stem}.{leaf}"]
        parts = mlx.quantize(mlx.random.normal((e, n, k)).astype(mlx.float16), 64, 8)
        head, _, projection = stem.partition("switch_mlp.")
        for i in range(e):
            for leaf, array in zip(("weight", "scales", "biases"), parts, strict=True):
                ck.tensors[f"{head}experts.{i}.{projection}.{leaf}"] = stored(np.array(array[i]))
    model = formats.read(ck.write(tmp_path))
    assert model.format == "mlx-affine"
    assert model.weights["layers.0.mlp.experts.down"].instances() == {Instance("linear", 8, "f16")}


def test_tq_pairs_in_different_shards(raw, tmp_path):
    model = formats.read(raw("tqvllm_tiny").write(tmp_path, shards=3))
    same_weights(model.weights, formats.read(checkpoint("tqvllm_tiny")).weights)


def test_tq_bits_follow_from_shapes(raw, tmp_path):
    ck = raw("tqvllm_tiny")
    ck.json["tq_config.json"] |= {"bits": 2, "sensitive_bits": 3, "sensitive_patterns": ["gate"]}
    model = formats.read(ck.write(tmp_path))
    same_weights(model.weights, formats.read(checkpoint("tqvllm_tiny")).weights)


def test_tq_per_expert(raw, tmp_path):
    ck = raw("tqvllm_tiny")
    for name in [n for n in ck.tensors if ".experts." in n and "language_model" in n]:
        array = ck.array(name)
        stem, leaf = name.rsplit(".", 1)
        head, projection = stem.rsplit(".", 1)
        del ck.tensors[name]
        for e, one in enumerate(np.split(array, 8)):
            halves = np.split(one, 2) if projection == "gate_up_proj" else [one]
            names = ["gate_proj", "up_proj"] if len(halves) == 2 else ["down_proj"]
            for part, half in zip(names, halves, strict=True):
                ck.tensors[f"{head}.{e}.{part}.weight.{leaf}"] = stored(half)
    model = formats.read(ck.write(tmp_path))
    same_weights(model.weights, formats.read(checkpoint("tqvllm_tiny")).weights)


def test_mlx_config_entries_are_only_compared(raw, tmp_path):
    ck = raw("configi_tiny")
    entries = ck.config["quantization"]
    for key in [k for k in entries if "." in k]:
        del entries[key]
    entries["language_model.lm_head"] = {"bits": 4, "group_size": 64}
    entries["language_model.model.embed_tokens"] = False
    model = formats.read(ck.write(tmp_path))
    same_weights(model.weights, formats.read(checkpoint("configi_tiny")).weights)
    assert model.notes == [
        "embed_tokens: config.json says not quantised; the tensors are",
        "lm_head: config.json says bits, group (4, 64); the tensors hold (8, 64)",
    ]


def test_fused_bf16_experts_inside_compressed_tensors(raw, tmp_path):
    ck = raw("w4a16_tiny")
    stem = "model.language_model.layers.0.mlp.experts."
    arrays = {
        p: np.stack([ck.array(f"{stem}{e}.{p}_proj.weight") for e in range(8)])
        for p in ("gate", "up", "down")
    }
    for name in [n for n in ck.tensors if n.startswith(stem)]:
        del ck.tensors[name]
    ck.tensors[f"{stem}gate_up_proj"] = stored(np.concatenate([arrays["gate"], arrays["up"]], 1))
    ck.tensors[f"{stem}down_proj"] = stored(arrays["down"])
    model = formats.read(ck.write(tmp_path))
    same_weights(model.weights, formats.read(checkpoint("w4a16_tiny")).weights)


def test_zero_points_of_zero_are_symmetric_and_kv_scales_are_validated(raw, tmp_path):
    ck = raw("w4a16_tiny")
    stem = "model.language_model.layers.3.self_attn."
    ck.tensors[f"{stem}k_proj.weight_zero_point"] = stored(
        np.full((32, 2), -(1 << 31) | 0x808080, np.int64).astype(np.int32)
    )
    scales = {"k_scale": [0.5], "v_scale": [-2e29], "q_scale": [np.inf]}
    for name, value in scales.items():
        ck.tensors[stem + name] = stored(np.float32(value))
    ck.tensors["model.language_model.layers.1.self_attn.k_scale"] = stored(np.ones((2, 1, 1), "f4"))
    model = formats.read(ck.write(tmp_path))
    same_weights(model.weights, formats.read(checkpoint("w4a16_tiny")).weights)
    found = {
        n.partition("self_attn.")[2]: v.tolist() for n, v in model.kv_scales.items() if ".3." in n
    }
    assert found == {"k_scale": [0.5], "v_scale": [1.0], "q_scale": [1.0]}
    assert sorted(model.kv_scales_ignored) == [f"{stem}q_scale", f"{stem}v_scale"]
    assert model.kv_scales["layers.1.self_attn.k_scale"].tolist() == [1, 1]


def test_group_index_in_natural_order_is_accepted(raw, tmp_path):
    ck = raw("w4a16_tiny")
    name = "model.language_model.layers.3.self_attn.q_proj.weight_g_idx"
    ck.tensors[name] = stored(np.repeat(np.arange(2, dtype=np.int32), 128))
    same_weights(
        formats.read(ck.write(tmp_path)).weights, formats.read(checkpoint("w4a16_tiny")).weights
    )


def test_text_only_config_and_tied_head(raw, tmp_path):
    ck = raw("stdlib_bf16")
    ck.tensors = {
        n: t for n, t in ck.tensors.items() if "visual" not in n and n != "lm_head.weight"
    }
    text = ck.config["text_config"] | {"tie_word_embeddings": True}
    rope = text.pop("rope_parameters")
    ck.json["config.json"] = text | {
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": rope | {"type": rope.pop("rope_type")},
    }
    model = formats.read(ck.write(tmp_path))
    assert model.weights["lm_head"] is model.weights["embed_tokens"]
    source = formats.read(checkpoint("stdlib_bf16"))
    assert model.config["model_type"] == "qwen3_5_moe"
    got, want = (m.config["text_config"] for m in (model, source))
    assert got["rope_parameters"] == want["rope_parameters"]
    assert got["layer_types"] == want["layer_types"]
    assert model.vision == {}


@pytest.mark.parametrize("name", [*TINY, *STDLIB])
def test_config_has_no_storage_keys_and_builds_the_model_config(name):
    config = formats.read(checkpoint(name)).config
    assert not [k for k in config if "quant" in k or k.startswith(("mxtq", "weight_format"))]
    json.dumps(config)
    transformers = pytest.importorskip("transformers")
    built = transformers.Qwen3_5MoeConfig(**config)
    rope = config["text_config"]["rope_parameters"]
    assert built.text_config.rope_parameters["rope_theta"] == rope["rope_theta"]
    assert built.text_config.num_experts == config["text_config"]["num_experts"]


def test_yarn_is_merged_not_replaced():
    config = formats.read(checkpoint("w4a16_tiny")).config
    before = json.dumps(config)
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
    text = formats.with_rope(config, yarn)["text_config"]
    assert text["max_position_embeddings"] == 1048576
    assert text["rope_parameters"] == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144,
        "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    }  # fmt: skip
    assert json.dumps(config) == before
    with pytest.raises(FormatError, match="rope_theta: expected a number above 0, found -1"):
        formats.with_rope(config, {"rope_theta": -1})
