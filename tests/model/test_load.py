"""load(): what it builds, what it does not read, what it refuses, and transformers' own entry."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import recorded

torch = pytest.importorskip("torch")

import hadamoe  # noqa: E402
from hadamoe import (  # noqa: E402
    ContractError,
    FormatError,
    Instance,
    UnsupportedError,
    packed,
    synth,
)

FIVE = ("configi_tiny", "jangtq_tiny", "mxfp4_node_tiny", "tqvllm_tiny", "w4a16_tiny")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}


@pytest.mark.parametrize("name", FIVE)
def test_nothing_trains_and_nothing_stays_on_meta(name, load):
    model, _ = load(name)
    tensors = [*model.parameters(), *model.buffers()]
    assert not model.training
    assert not any(t.requires_grad or t.is_meta for t in tensors)
    assert model.device == torch.device("cpu")
    assert model.dtype == model.config.dtype == torch.float32


def test_vision_tower_decides_the_class_and_the_directory_the_tokenizer(load):
    names = {n: (type(load(n)[0]).__name__, load(n)[1] is not None) for n in FIVE}
    assert names == {
        "configi_tiny": ("Qwen3_5MoeForCausalLM", True),
        "jangtq_tiny": ("Qwen3_5MoeForConditionalGeneration", True),
        "mxfp4_node_tiny": ("Qwen3_5MoeForConditionalGeneration", True),
        "tqvllm_tiny": ("Qwen3_5MoeForConditionalGeneration", True),
        "w4a16_tiny": ("Qwen3_5MoeForConditionalGeneration", False),
    }


def test_vision_features(load, golden):
    arrays = golden("jangtq_tiny_logits")
    model, _ = load("jangtq_tiny")
    pixels, grid = (torch.from_numpy(arrays[f"vision_{n}"]) for n in ("pixel_values", "grid_thw"))
    with torch.no_grad():
        out = model.model.visual(pixels, grid)
    want = torch.from_numpy(arrays["vision_features"])
    torch.testing.assert_close(out.pooler_output, want, rtol=0, atol=1e-4)


def test_an_image_reaches_the_text_model(checkpoint, golden):
    arrays = golden("jangtq_tiny_logits")
    model, _ = hadamoe.load(checkpoint("jangtq_tiny"), dtype="float32")  # keeps image positions
    pixels, grid = (torch.from_numpy(arrays[f"vision_{n}"]) for n in ("pixel_values", "grid_thw"))
    image = model.config.image_token_id
    ids = torch.tensor([[5, model.config.vision_start_token_id, *[image] * 4, 9, 11]])
    kinds = (ids == image).int()
    with torch.no_grad():
        a, b = (
            model(ids, pixel_values=p, image_grid_thw=grid, mm_token_type_ids=kinds).logits
            for p in (pixels, pixels * 0.5)
        )
    assert torch.equal(a[:, :2], b[:, :2])
    assert (a[:, -1] - b[:, -1]).abs().max() > 1e-3


def test_generation_config_and_end_tokens(load):
    model, _ = load("jangtq_tiny")
    assert model.generation_config.eos_token_id == [510, 508]
    assert load("stdlib_w4a16")[0].generation_config.pad_token_id == 258


def test_default_dtype_is_the_config_s(checkpoint):
    model, _ = hadamoe.load(checkpoint("stdlib_configi"))
    assert model.dtype == torch.bfloat16
    norm = model.model.norm.weight
    assert norm.dtype == torch.float32


def test_embedding_reads_only_the_rows_asked_for(load):
    model, _ = load("configi_tiny")
    ids = torch.tensor([[3, 200, 3]])
    table = model.get_input_embeddings()
    assert table(ids).shape == (1, 3, table.embedding_dim)
    assert torch.equal(table(ids)[0, 0], table(ids)[0, 2])


def test_yarn_table(golden):
    """Frequencies and angles transformers computes from the merged config of the real model."""
    from transformers.models.qwen3_5_moe import configuration_qwen3_5_moe as c
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as hf

    from hadamoe.formats.config import with_rope

    arrays = golden("w4a16_yarn")
    plain = {
        "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
        "mrope_interleaved": True, "mrope_section": [11, 11, 10],
    }  # fmt: skip
    text = {"rope_parameters": plain, "head_dim": 256, "max_position_embeddings": 262144}
    for key, config in (
        ("default", {"text_config": text}),
        ("yarn4", with_rope({"text_config": text}, YARN)),
    ):
        config = c.Qwen3_5MoeTextConfig(**config["text_config"])
        rope = hf.Qwen3_5MoeTextRotaryEmbedding(config)
        np.testing.assert_array_equal(rope.inv_freq.numpy(), arrays[f"{key}_inv_freq"])
        assert rope.attention_scaling == float(arrays[f"{key}_attention_factor"])
        for suffix in ("", "3"):
            position = torch.from_numpy(arrays[f"{key}_pos{suffix}"])
            position = position if suffix else position[None]
            cos, sin = rope(torch.zeros(1), position)
            np.testing.assert_allclose(cos, arrays[f"{key}_cos{suffix}"], rtol=0, atol=1e-6)
            np.testing.assert_allclose(sin, arrays[f"{key}_sin{suffix}"], rtol=0, atol=1e-6)


def test_yarn_override_keeps_theta_share_and_sections(checkpoint, load):
    path = checkpoint("w4a16_tiny")
    model, _ = hadamoe.load(path, dtype="float32", rope=YARN)
    before = load("w4a16_tiny")[0].config.text_config.rope_parameters
    text = model.config.text_config
    for key in ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved"):
        assert text.rope_parameters[key] == before[key]
    assert text.rope_parameters["rope_type"] == "yarn"
    assert text.max_position_embeddings == 1048576
    rotary = model.model.language_model.rotary_emb
    assert rotary.attention_scaling == pytest.approx(1.138629436111989, rel=1e-15)


def test_missing_instances_are_listed_in_one_error(checkpoint, monkeypatch):
    have = (Instance("plain", 16, "bf16"), Instance("linear", 8, "bf16"))
    monkeypatch.setattr(packed, "instances", lambda: have)
    with pytest.raises(UnsupportedError) as error:
        hadamoe.load(checkpoint("configi_tiny"))
    assert all(
        name in str(error.value) for name in ("linear2/bf16", "linear3/bf16", "linear4/bf16")
    )
    assert str(error.value).endswith("it has plain/bf16 linear8/bf16")


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"device": "xpu"}, UnsupportedError, "load: device='xpu' has no kernels, needs 'cpu', "),
        ({"device": None}, ContractError, "load: device=None, needs 'cpu', 'cuda' or 'mps'"),
        ({"device": "toaster"}, ContractError, "load: device='toaster', needs 'cpu', 'cuda' or"),
        (
            {"framework": "jax"},
            UnsupportedError,
            "load: framework is 'jax', needs 'torch' or 'mlx'",
        ),
        ({"dtype": "int8"}, ContractError, "load: dtype=torch.int8, needs float32, bfloat16"),
    ],
)
def test_refused_options(checkpoint, options, kind, text):
    with pytest.raises(kind, match=text.replace("(", "\\(")):
        hadamoe.load(checkpoint("configi_tiny"), **options)


@pytest.mark.parametrize("name", FIVE)
def test_auto_class_opens_our_directories(name, checkpoint, load, golden):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.float32)
    assert type(model).__name__ == "Qwen3_5MoeForCausalLM"
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load(name)[0](ids).logits)


def test_auto_class_takes_the_card_s_rope_override_and_an_attention_kind(checkpoint, load):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint("w4a16_tiny"), rope_scaling=YARN, attn_implementation="eager", device_map="auto"
    )
    assert model.model.rotary_emb.rope_type == "yarn"
    assert model.config._attn_implementation == "eager"


def test_auto_class_with_the_checkpoint_s_own_config_and_path_by_name(checkpoint):
    from transformers import AutoConfig, AutoModelForCausalLM

    path = checkpoint("stdlib_mxfp4")
    config = AutoConfig.from_pretrained(path)
    call = AutoModelForCausalLM.from_pretrained
    model = call(pretrained_model_name_or_path=path, config=config, device_map={"": "cpu"})
    assert type(model.lm_head).__module__ == "hadamoe.torch_layers"
    config.get_text_config().rms_norm_eps = 1.0
    with pytest.raises(UnsupportedError, match="config differs from the checkpoint's own"):
        call(path, config=config)


def test_pipeline(checkpoint):
    from transformers import pipeline

    generate = pipeline("text-generation", model=str(checkpoint("stdlib_mxfp4")))
    (found,) = generate("def f(", max_new_tokens=4)
    assert found["generated_text"] == "def f(self"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"rope_parameters": {"rope_type": "nope", "rope_theta": 1e7}},
         "/config.json: rope_type: expected default or linear or"),
        ("config.json", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e7}},
         "/config.json: expected a config that transformers accepts, found KeyError"),
        ("config.json", {"rope_parameters": {"factor": "x", "rope_theta": 1e7}},
         "/config.json: factor: expected a number above 0, found 'x'"),
        ("config.json", {"eos_token_id": "x"},
         "/config.json: expected a config that transformers accepts, found Strict"),
        ("tokenizer.json", {"model": 3}, ": expected a tokenizer that transformers reads, found "),
    ],
)  # fmt: skip
def test_files_transformers_cannot_use(checkpoint, tmp_path, file, change, message):
    path = shutil.copytree(checkpoint("stdlib_mxfp4"), tmp_path / "m")
    whole = json.loads((path / file).read_text())
    whole.get("text_config", whole).update(change)
    (path / file).write_text(json.dumps(whole))
    with pytest.raises(FormatError) as error:
        hadamoe.load(path)
    assert str(error.value).startswith(f"{path}{message}")


def test_without_torch_load_says_what_to_install():
    code = "import sys; sys.modules['torch'] = None; import hadamoe; hadamoe.load('.')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stderr.endswith(
        "ModuleNotFoundError: load: needs torch; install it with: pip install 'hadamoe[torch]'\n"
    )


def test_saving_is_refused(load, tmp_path):
    with pytest.raises(UnsupportedError, match="save_pretrained: the checkpoint is read in place"):
        load("configi_tiny")[0].save_pretrained(tmp_path)


def test_auto_class_refuses_options_that_would_be_ignored(checkpoint):
    from transformers import AutoModelForCausalLM

    with pytest.raises(UnsupportedError, match="quantization_config has no meaning"):
        AutoModelForCausalLM.from_pretrained(checkpoint("configi_tiny"), quantization_config={})


def test_auto_class_leaves_plain_checkpoints_to_transformers(checkpoint):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint("stdlib_bf16"), dtype=torch.float32)
    assert isinstance(model.lm_head, torch.nn.Linear)


def test_import_loads_no_framework_and_the_hook_works_in_either_order():
    code = """
import sys
if {first}: from transformers import AutoModelForCausalLM
import hadamoe
assert {first} or not {{"torch", "transformers", "mlx"}} & set(sys.modules)
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
assert AutoModelForCausalLM.from_pretrained.__func__.hadamoe
assert AutoModelForImageTextToText.from_pretrained.__func__.hadamoe
"""
    for first in (True, False):
        subprocess.run([sys.executable, "-c", code.format(first=first)], check=True)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux counts mapped pages")
@pytest.mark.parametrize("format", ["jangtq2", "w4a16"])
def test_opening_reads_headers_norms_and_scales_only(format, tmp_path):
    shape = dataclasses.replace(synth.TINY, layers=4, hidden=512, experts=48, moe=512)
    plan = synth.plan(format, shape, mtp=False)
    path = plan.write(tmp_path / format)
    model, _ = hadamoe.load(path)
    opened = recorded.mapped_pages(path)
    assert opened < 0.2 * plan.nbytes
    with torch.no_grad():
        assert model(torch.tensor([[1]])).logits.isfinite().all()
    assert opened < recorded.mapped_pages(path) <= 1.1 * plan.nbytes
