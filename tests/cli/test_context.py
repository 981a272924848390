"""bench --context: every format of the KV cache beside bf16."""

from __future__ import annotations

import json

import pytest
from recorded import checkpoint
from typer.testing import CliRunner

import hadamoe
from hadamoe import inspect, kv
from hadamoe.cli import app

pytest.importorskip("torch")
import torch

from hadamoe import torch_bench
from hadamoe.torch_decode import Decoder

OURS = ("hk8v8", "hk8v4", "hk4v4", "hk4v3", "hk4v2")


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_bench_compares_contexts(tmp_path):
    directory, out = checkpoint("stdlib_jangtq2"), tmp_path / "b.json"
    result = call(
        "bench", directory, "--no-instances", "--context", "200,1k", "--prompt-tokens", 70,
        "--new-tokens", 3, "--repeats", 1, "--json", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for text in ("synthetic context", "a prompt of 70 tokens", "1,024", *OURS):
        assert text in result.stdout
    report = json.loads(out.read_text())
    rows = {(r["kv"], r["context"]): r for r in report["context"]}
    assert set(rows) == {(name, n) for name in ("bf16", *OURS) for n in (200, 1024)}
    assert all(0 < r["best"] <= r["seconds"] for r in rows.values())
    config = json.loads((directory / "config.json").read_text())
    text = config.get("text_config", config)
    width = text["num_key_value_heads"] * text["head_dim"]
    layers = text["num_hidden_layers"] // text["full_attention_interval"]
    assert rows["bf16", 1024]["cache_bytes"] == layers * 1024 * width * 4
    for name in OURS:
        assert rows[name, 1024]["cache_bytes"] < rows["bf16", 1024]["cache_bytes"]
        codecs = kv.formats_of(name, 1)[0]
        page = sum(kv.page_bytes(codec, text["head_dim"]) for codec in codecs)
        coded = layers * text["num_key_value_heads"] * 15 * page
        raw = layers * 2 * 3 * kv.PAGE * width * 2
        assert coded + raw <= rows[name, 1024]["cache_bytes"] <= coded + raw + 4096
    floors = [rows[name, 1024]["floor"] for name in ("bf16", "hk4v2")]
    assert floors[0] > floors[1] > 0
    assert {r["kv"] for r in report["prefill"]} == {"bf16", *OURS}
    assert inspect.describe(directory).token_bytes > 0


@pytest.mark.parametrize("name", ["bf16", "hk8v8", "hk4v2"])
def test_a_filled_decoder_goes_on(name):
    model, _ = hadamoe.load(checkpoint("stdlib_jangtq2"))
    for tokens in (1, 63, 64, 65, 300):
        decoder = Decoder(model, tokens + 70, kv=name)
        torch_bench._fill(decoder, tokens)
        assert decoder.length == tokens
        if decoder.cache is not None:
            assert decoder.cache.lengths.tolist() == [tokens]
        one = torch.ones(1, 1, dtype=torch.int64)
        outputs = [decoder.logits(decoder.feed(one)) for _ in range(66)]
        assert all(y.isfinite().all() for y in outputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("4x",), "--context has '4x', needs numbers such as 4k or 4096"),
        (("4k,33",), "a context of 33 tokens, needs at least 34: 32 are new"),
        (("4k", "--kv", "hk9"), None),
    ],
)
def test_what_cannot_be_measured_is_said_first(options, message):
    result = call("bench", checkpoint("stdlib_jangtq2"), "--context", *options)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    expected = (
        "hadamoe: kv: 'hk9' is no preset" if message is None else f"hadamoe: bench: {message}"
    )
    assert result.stderr.startswith(expected)


def test_too_little_memory_is_said_first(monkeypatch):
    monkeypatch.setattr(torch_bench, "available_bytes", lambda: 1)
    args = ("bench", checkpoint("stdlib_jangtq2"), "--no-instances", "--prompt-tokens", 2)
    result = call(*args, "--new-tokens", 2, "--repeats", 1, "--context", "4k")
    assert result.exit_code == 1
    assert "hadamoe: bench: a cache of 4,096 tokens needs 0." in result.stderr
