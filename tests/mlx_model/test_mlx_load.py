"""load(framework="mlx") and mlx_lm.load(): what they build, leave to mlx-lm and refuse."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import recorded

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
mlx_lm = pytest.importorskip(
    "mlx_lm", reason="mlx-lm is not installed (pip install 'hadamoe[mlx]')"
)
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm import utils  # noqa: E402
from mlx_lm.models import qwen3_5_moe  # noqa: E402
from mlx_lm.tokenizer_utils import TokenizerWrapper  # noqa: E402

import hadamoe  # noqa: E402
from hadamoe import (  # noqa: E402
    ContractError,
    FormatError,
    UnsupportedError,
    Weight,
    mlx_model,
    synth,
)
from hadamoe.mlx_layers import QLinear  # noqa: E402

FORMATS = ("configi", "jangtq2", "mxfp4", "tq_apex2", "w4a16")


@pytest.mark.parametrize("format", FORMATS)
def test_it_is_mlx_lms_model(format, load):
    model, tokenizer = load(f"stdlib_{format}")
    assert isinstance(model, qwen3_5_moe.Model)
    assert isinstance(tokenizer, TokenizerWrapper)
    assert tokenizer.eos_token_ids
    tokenizer.detokenizer.add_token(65)
    assert not model.training
    assert len(model.layers) == model.language_model.args.num_hidden_layers
    assert "(lm_head): QLinear(output_dims=272" in repr(model)
    places = {name.removeprefix("language_model.model.") for name, _ in model.named_modules()}
    assert places >= {
        "embed_tokens", "layers.0.linear_attn", "layers.3.self_attn.o_proj", "layers.3.mlp", "norm",
        "language_model.lm_head"
    }  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_stored_matrices_are_no_parameters(format, load):
    model, _ = load(f"stdlib_{format}")
    parameters = dict(tree_flatten(model.parameters()))
    assert list(parameters) == ["language_model.model.norm.weight"]
    mx.eval(model.parameters())
    model.freeze()
    assert not tree_flatten(model.trainable_parameters())


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux counts mapped pages")
def test_opening_reads_headers_norms_and_scales_only(tmp_path):
    shape = dataclasses.replace(synth.TINY, layers=4, hidden=512, experts=48, moe=512)
    plan = synth.plan("jangtq2", shape, mtp=False)
    path = plan.write(tmp_path / "jangtq2")
    model, _ = hadamoe.load(path, framework="mlx")
    mx.eval(model.parameters())
    opened = recorded.mapped_pages(path)
    assert opened < 0.2 * plan.nbytes
    assert mx.isfinite(model(mx.array([[1]]))).all()
    assert opened < recorded.mapped_pages(path) <= 1.1 * plan.nbytes


def test_directories_without_a_tokenizer(load):
    assert load("w4a16_tiny")[1] is None


@pytest.mark.parametrize("name", ["stdlib_tq_apex2", "jangtq_tiny"])
def test_resident(name, checkpoint, load):
    model, _ = hadamoe.load(checkpoint(name), framework="mlx", dtype="float32", resident=True)
    ids = mx.array([[1, 2, 3]])
    assert mx.array_equal(model(ids), load(name)[0](ids))


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"vision": True}, UnsupportedError, "load: vision=True, mlx-lm's qwen3_5_moe has no"),
        ({"dtype": "int8"}, ContractError, "load: dtype=int8, needs float32, bfloat16 or float16"),
        ({"dtype": mx.int32}, ContractError, "load: dtype=int32, needs"),
        ({"kv": "q4"}, ContractError, "kv: 'q4' is no preset, needs one of bf16, hk8v8"),
        ({"kv": ["hk4v3"]}, ContractError, "kv: has 1 presets, needs one or 2"),
        ({"rope": "yarn"}, ContractError, "rope: 'yarn', needs yarn:FACTOR"),
        (
            {"rope": {"rope_type": "dynamic", "factor": 2.0}}, UnsupportedError,
            "load: rope_type is 'dynamic', on MLX it needs 'default' or 'yarn'",
        ),
        (
            {"rope": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.0}},
            UnsupportedError, "load: rope parameter attention_factor has no meaning to mlx-lm's",
        ),
    ],
)  # fmt: skip
def test_refused_options(options, kind, text, checkpoint):
    with pytest.raises(kind, match=re.escape(text)):
        hadamoe.load(checkpoint("stdlib_mxfp4"), framework="mlx", **options)


def test_what_it_cannot_do_is_refused(load):
    model, _ = load("stdlib_mxfp4")
    for name, arguments in (("save_weights", ["x"]), ("load_weights", [[]]), ("shard", [])):
        with pytest.raises(UnsupportedError, match=f"^{name}: the "):
            getattr(model, name)(*arguments)


def test_wrong_directories(tmp_path, checkpoint):
    with pytest.raises((FormatError, OSError)):
        hadamoe.load(tmp_path / "none", framework="mlx")
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint("stdlib_mxfp4"), broken)
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(FormatError, match="expected a tokenizer that mlx-lm reads, found"):
        hadamoe.load(broken, framework="mlx")
    (broken / "model.safetensors").write_bytes(b"")
    with pytest.raises(FormatError, match=r"model.safetensors"):
        hadamoe.load(broken, framework="mlx")


@pytest.mark.parametrize("format", FORMATS)
def test_mlx_lm_load(format, checkpoint):
    path = str(checkpoint(f"stdlib_{format}"))
    model, tokenizer, config = mlx_lm.load(path, return_config=True)
    assert isinstance(model, mlx_model.Model)
    assert isinstance(tokenizer, TokenizerWrapper)
    assert config == utils.load_config(checkpoint(f"stdlib_{format}"))
    assert mlx_lm.generate(model, tokenizer, "def f(", max_tokens=4)


def test_options_through_mlx_lm_load(checkpoint):
    path = str(checkpoint("stdlib_jangtq2"))
    given = {"kv": "hk4v3", "rope": "yarn:2", "dtype": "float32", "quantize_activations": False}
    model, _ = mlx_lm.load(path, model_config=given)
    attention = model.layers[3].self_attn
    assert (model.kv, attention.dtype) == ("hk4v3", mx.float32)
    assert attention.rope.mscale > 1
    with pytest.raises(UnsupportedError, match="model_config 'rope_theta' has no meaning"):
        mlx_lm.load(path, model_config={"rope_theta": 5.0})


def test_mlx_lm_refuses_adapters(checkpoint, tmp_path):
    adapter = {"num_layers": 2, "lora_parameters": {"rank": 8, "scale": 1.0, "dropout": 0.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {"a": mx.zeros(1)})
    with pytest.raises(ValueError, match="a: not an adapter parameter in the model"):
        mlx_lm.load(str(checkpoint("stdlib_jangtq2")), adapter_path=str(tmp_path))


def test_what_is_left_to_mlx_lm(checkpoint):
    """Plain checkpoints, whoever wants arrays or has classes, and who says so."""
    path = str(checkpoint("stdlib_configi"))
    theirs = [
        mlx_lm.load(str(checkpoint("stdlib_bf16"))),
        mlx_lm.load(path, lazy=True),
        mlx_lm.load(path, model_config={"hadamoe": False}),
        utils.load_model(checkpoint("stdlib_configi"), get_model_classes=utils._get_classes),
    ]
    assert not any(isinstance(model, mlx_model.Model) for model, _ in theirs)
    with pytest.raises(ValueError, match="parameters not in model"):
        mlx_lm.load(str(checkpoint("stdlib_jangtq2")), model_config={"hadamoe": False})


def test_the_hook_works_in_either_order_and_imports_nothing():
    code = """
import sys
if {first}: from mlx_lm.utils import load
import hadamoe
assert {first} or not {{"mlx", "mlx_lm"}} & set(sys.modules)
import mlx_lm.utils
assert mlx_lm.utils.load_model.hadamoe
assert mlx_lm.utils.load_model.__doc__.strip().startswith("Load and initialize")
"""
    for first in (True, False):
        subprocess.run([sys.executable, "-c", code.format(first=first)], check=True)


def test_missing_packages_are_named(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "hadamoe.mlx_model", None)
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    monkeypatch.delitem(sys.modules, "hadamoe.mlx_model")
    monkeypatch.delattr(hadamoe, "mlx_model")
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'hadamoe[mlx]'")):
        hadamoe.load(checkpoint("stdlib_mxfp4"), framework="mlx")


def test_layers_take_any_float():
    rows = mx.random.normal((8, 64)).astype(mx.bfloat16)
    layer = QLinear(Weight.of(("plain", 16, "bf16"), 64, np.array(rows.view(mx.uint16))))
    x = mx.random.normal((2, 3, 64))
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        y = layer(x.astype(dtype))
        assert (y.shape, y.dtype) == ((2, 3, 8), dtype)
        want = x.astype(dtype).astype(mx.float32) @ rows.astype(mx.float32).T
        assert mx.allclose(y.astype(mx.float32), want, rtol=1e-2, atol=1e-2)
