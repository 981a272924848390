"""run and bench: whole models through the command line."""

from __future__ import annotations

import json

import pytest
from recorded import checkpoint
from typer.testing import CliRunner

import hadamoe
from hadamoe import ops, synth
from hadamoe.cli import app

pytest.importorskip("torch")
from hadamoe import torch_run


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_run_streams_text_and_reports():
    result = call(
        "run", checkpoint("stdlib_mxfp4"), "-p", "import os\nimport ", "--max-tokens", 24,
        "--dtype", "float32",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout == "import os\nimport sys\nimport sys\nimport sy\n"
    for text in ("prefill    17 tokens", "decode     24 tokens", "tok/s", "MB resident"):
        assert text in result.stderr


def test_run_samples_the_same_with_the_same_seed():
    args = ("run", checkpoint("stdlib_configi"), "-p", "def ", "--max-tokens", 16)
    texts = [call(*args, "--temperature", 1, "--top-p", 0.9, "--seed", s).stdout for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_run_over_a_quantized_cache():
    args = ("run", checkpoint("stdlib_mxfp4"), "-p", "import os\nimport ", "--max-tokens", 24)
    plain, result = call(*args), call(*args, "--kv", "hk4v3")
    assert result.exit_code == 0, result.output
    assert result.stdout == plain.stdout  # all in the first page
    assert "cache      bfloat16, 512 bytes per token, 0.0 MB held" in plain.stderr
    assert "cache      hk4v3, 120 bytes per token, 0.1 MB held" in result.stderr
    with pytest.warns(UserWarning, match="layers left unquantized: 0"):
        mixed = call(*args, "--kv", "bf16,hk8v4")
    assert "cache      bf16,hk8v4, 356 bytes per token" in mixed.stderr
    wrong = call(*args, "--kv", "hk5")
    assert (wrong.exit_code, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("hadamoe: kv: 'hk5' is no preset, needs one of bf16, hk8v8, ")


def test_run_without_tokenizer():
    result = call("run", checkpoint("w4a16_tiny"), "-p", "x")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (
        "hadamoe: run: the checkpoint has no tokenizer, cannot read a text prompt\n"
    )


def test_bench_writes_figures(tmp_path):
    result = call(
        "bench", checkpoint("stdlib_jangtq2"), "--json", tmp_path / "b.json", "--plot",
        tmp_path / "b.png", "--seconds", 0.01, "--pool", 1, "--prompt-tokens", 8,
        "--new-tokens", 3,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "b.json").read_text())
    assert {r["instance"] for r in report["instances"]} == {str(i) for i in ops.instances()}
    assert report["model"]["new tokens"] == 3
    assert report["machine"]["cores"] >= 1
    assert (tmp_path / "b.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", synth.FORMATS)
def test_synthetic_models_run(name, tmp_path):
    """Logits of a synthetic model are finite and of a trained model's size; its text is text."""
    path = synth.plan(name, synth.TINY).write(tmp_path / name)
    model, tokenizer = hadamoe.load(str(path))
    logits = model(input_ids=torch_run.encode(tokenizer, "def fib(n):")).logits.float()
    assert logits.shape == (1, 11, synth.TINY.vocab)
    assert logits.isfinite().all()
    assert 0.3 < logits.std() < 3
    done = torch_run.stream(model, tokenizer, "x", max_tokens=8, stop=False)
    assert done.new_tokens == 8
    assert done.text


def test_run_reaches_further_with_yarn():
    prompt = "x" * 4100  # the model has 4096 positions
    args = ("run", checkpoint("stdlib_jangtq2"), "-p", prompt, "--max-tokens", 2)
    result = call(*args)
    assert (result.exit_code, result.stdout) == (1, prompt)
    assert result.stderr.startswith("hadamoe: run: 4100 prompt and 2 new tokens take 4101 posi")
    result = call(*args, "--rope", "yarn:2")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(prompt)
