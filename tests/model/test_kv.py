"""Whole models over the quantized cache: the same bits however it is used."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kv_support import NAME, logits_of, text  # noqa: E402
from recorded import checkpoint  # noqa: E402
from transformers import DynamicCache  # noqa: E402

import hadamoe  # noqa: E402
from hadamoe import kv_file, ops, torch_run  # noqa: E402
from hadamoe.errors import ContractError, UnsupportedError  # noqa: E402
from hadamoe.kv import PRESETS  # noqa: E402
from hadamoe.kv_cache import KVCache  # noqa: E402
from hadamoe.torch_decode import Decoder, prefix_cache, text_model  # noqa: E402
from hadamoe.torch_kv import KVChoice, QuantizedCache, decoded  # noqa: E402

#: mean KL of the next token against the unquantized cache, on `text` past its second page: three
#: times what was measured
KL = {
    "bf16": 1e-6, "hk8v8": 2e-6, "hk8v4": 1.5e-4, "hk4v4": 2e-4, "hk4v3": 5e-4, "hk4v2": 1.5e-3,
    "fp8": 2e-4, "affine8": 2e-6, "affine4": 3e-4, "kivi4": 1.2e-4, "kivi2": 7e-3,
    "turbo4": 6e-4, "turbo3": 2e-3, "turbo4v2": 3e-3, "turbo2": 8e-3,
}  # fmt: skip


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kv", KL)
def test_cuts_of_a_prompt(kv, load):
    model, _ = load(NAME, "bfloat16")
    ids = text(300)
    want = logits_of(model, ids, QuantizedCache(model, kv))
    for sizes in ([3, 130, 119, *[1] * 48], [64] * 4 + [44]):
        assert torch.equal(logits_of(model, ids, QuantizedCache(model, kv), sizes), want)
    decoder = Decoder(model, 300, kv=KVChoice.of(model.config, kv))
    for i in range(0, 299, 13):
        decoder.feed(ids[:, i : min(i + 13, 299)])
    assert torch.equal(decoder.logits(decoder.feed(ids[:, 299:])), want[0, -1])
    exact = logits_of(model, ids, DynamicCache(config=model.config))
    p, q = (x[:, 128:].double().log_softmax(-1) for x in (exact, want))
    assert (p.exp() * (p - q)).sum(-1).mean() <= KL[kv]
    assert not torch.equal(exact, want)


@pytest.mark.parametrize("kv", ["hk8v8", "hk4v3", "turbo4v2"])
def test_runs_and_threads(kv, load):
    model, _ = load(NAME, "float32")
    ids, before = text(700), ops.threads()
    want = logits_of(model, ids, QuantizedCache(model, kv), [690, *[1] * 10])
    try:
        for count in (1, 2, 3, 8):
            ops.set_threads(count)
            assert torch.equal(logits_of(model, ids, QuantizedCache(model, kv), [690, 10]), want)
    finally:
        ops.set_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 127, 128, 129])
def test_lengths_round_pages(n, dtype, load):
    """The first page is as it came: nothing differs from bf16's pages before the second is full."""
    model, _ = load(NAME, dtype)
    ids = text(n + 2)
    one = logits_of(model, ids, QuantizedCache(model, "hk4v2"), [n, 1, 1])
    assert torch.equal(logits_of(model, ids, QuantizedCache(model, "hk4v2")), one)
    raw = logits_of(model, ids, QuantizedCache(model, "bf16"))
    if dtype != "float32":
        assert torch.equal(one[:, :128], raw[:, :128])
    assert torch.equal(one, raw) == (n + 2 <= 128)


def test_a_preset_per_layer(load):
    model, _ = load(NAME, "bfloat16")
    with pytest.warns(UserWarning, match="layers left unquantized: 0"):
        decoder = Decoder(model, 200, kv=KVChoice.of(model.config, ["bf16", "hk4v3"]))
    decoder.feed(text(200))
    assert "layer 0: keys unquantized" in decoder.cache.describe()
    with pytest.raises(ContractError, match="has 3 presets, needs one or 2"):
        hadamoe.load(checkpoint(NAME), kv=["hk8v8"] * 3)
    with pytest.raises(ContractError, match="'hk9' is no preset"):
        hadamoe.load(checkpoint(NAME), kv="hk9")


@pytest.mark.parametrize("kv", ["bf16", "hk4v3", None])
@pytest.mark.parametrize("n", [100, 126, 150, 191, 250])
def test_a_rejected_draft_leaves_no_trace(n, kv, load):
    model, _ = load(NAME, "bfloat16")
    ids, draft = text(n + 80), text(9, 5)
    choice = kv and KVChoice.of(model.config, kv)
    plain = Decoder(model, 400, kv=choice)
    plain.feed(ids[:, :n])
    other = Decoder(model, 400, kv=choice)
    other.feed(ids[:, :n])
    mark = other.mark()
    other.feed(draft)
    other.rewind(mark)
    assert other.length == n
    for i in range(n, n + 79):
        assert torch.equal(other.feed(ids[:, i : i + 1]), plain.feed(ids[:, i : i + 1]))


def test_a_window_equals_all_while_it_sees_all(load):
    model, _ = load(NAME, "bfloat16")
    ids = text(500)
    seen = logits_of(model, ids, QuantizedCache(model, "hk4v3"))
    some = logits_of(model, ids, QuantizedCache(model, "hk4v3", window=4), [100] * 5)
    assert torch.equal(some[:, :384], seen[:, :384])  # page 5 is the last to see page 1
    assert not torch.equal(some[:, 384:], seen[:, 384:])
    decoder = Decoder(model, 500, kv=KVChoice.of(model.config, "hk4v3", window=4))
    assert torch.equal(decoder.logits(decoder.feed(ids)), some[0, -1])
    assert len(decoder.cache.pool.refs) == min(500 // 64 - 1, 10)


def test_a_prefix_hit_has_the_bits_of_a_cold_run(quantized):
    model, fed = quantized("hk4v3"), []
    text_model(model).embed_tokens.register_forward_pre_hook(
        lambda _, args: fed.append(args[0].shape[1])
    )
    prefix = prefix_cache(model, 1 << 30)
    ids = text(400)
    cold = Decoder(model, 400)
    want = cold.logits(cold.prompt(ids))
    for n, found in ((230, 0), (400, 230), (300, 230), (400, 300)):
        decoder = Decoder(model, 400, prefix=prefix)
        fed.clear()
        y = decoder.logits(decoder.prompt(ids[:, :n]))
        assert fed == [n - found]
        if n == 400:
            assert torch.equal(y, want)
            for a, b in zip(decoder._recurrent(), cold._recurrent(), strict=True):
                assert torch.equal(a, b)
            for i in range(2):
                mine, theirs = decoder.cache.layer(i), cold.cache.layer(i)
                for a, b in ((mine.key_pages, theirs.key_pages),
                             (mine.value_pages, theirs.value_pages)):  # fmt: skip
                    np.testing.assert_array_equal(a[mine.table[0, 1:6]], b[theirs.table[0, 1:6]])
    with pytest.raises(ContractError, match="400 tokens were fed before, needs none"):
        decoder.prompt(ids)
    assert len(prefix) == 3


def test_turns_go_on_from_each_other(quantized, monkeypatch):
    """A turn's end is remembered, and points inside a long prompt."""
    monkeypatch.setattr("hadamoe.torch_decode.EVERY", 128)
    model = quantized("hk8v4")
    prefix = prefix_cache(model, 1 << 30)
    first = Decoder(model, 500, prefix=prefix)
    first.prompt(text(300))
    assert [h.length for h in (prefix.find(text(n)[0].numpy()) for n in (129, 257, 301))] == [
        128, 256, 300,
    ]  # fmt: skip
    for token in text(340)[0, 300:]:
        first.feed(token.view(1, 1))
    first.remember()
    assert prefix.find(text(400)[0].numpy()).length == 340
    second = Decoder(model, 500, prefix=prefix)
    cold = Decoder(model, 500)
    assert torch.equal(second.prompt(text(400)), cold.prompt(text(400)))


def test_a_stream_goes_on_from_an_earlier_one(quantized):
    model = quantized("hk4v3")
    prefix = prefix_cache(model, 1 << 30)
    _, tokenizer = hadamoe.load(checkpoint(NAME))
    question = text(200)
    first = torch_run.stream(model, tokenizer, question, max_tokens=30, stop=False, prefix=prefix)
    answer = torch.tensor([list(first.text.encode())])
    turn = torch.cat([question, answer, text(40, 5)], 1)
    assert prefix.find(turn[0].numpy()).length == 200 + 29  # the last token was never fed
    second = torch_run.stream(model, tokenizer, turn, max_tokens=30, stop=False, prefix=prefix)
    plain = torch_run.stream(model, tokenizer, turn, max_tokens=30, stop=False)
    assert second.text == plain.text
    assert second.prompt_tokens == turn.shape[1]
    model.generation_config.min_p = 0.1
    try:
        with pytest.raises(UnsupportedError, match="prefix cache needs one sequence and plain"):
            torch_run.stream(model, tokenizer, turn, prefix=prefix)
    finally:
        model.generation_config.min_p = None


def test_a_saved_cache_goes_on(quantized, tmp_path):
    model = quantized("hk4v2")
    one = Decoder(model, 300)
    one.feed(text(200))
    one.cache.save(tmp_path / "cache")
    other = Decoder(model, 300)
    other.feed(text(200, 3))
    other.cache, other.length = KVCache.load(tmp_path / "cache"), one.length
    other._page()
    for a, b in zip(other._recurrent(), one._recurrent(), strict=True):
        a.copy_(b)
    assert torch.equal(other.feed(text(260)[:, 200:]), one.feed(text(260)[:, 200:]))


def test_every_preset_has_its_bound():
    assert KL.keys() == PRESETS.keys()


def test_fp8_takes_the_scales_of_the_checkpoint(tmp_path):
    """Of scales per head the largest; unusable ones count as 1."""
    path = tmp_path / "scaled"
    shutil.copytree(checkpoint("w4a16_tiny"), path)
    (path / "model.safetensors.index.json").unlink()
    at = "model.language_model.layers."
    numbers = {
        "1.self_attn.k_scale": [0.5], "3.self_attn.k_scale": [[[0.25]], [[2]]],
        "1.self_attn.v_scale": [-1], "3.self_attn.v_scale": [0.125],
    }  # fmt: skip
    kv_file._write(
        path / "scales.safetensors", {},
        {at + name: ("F32", np.array(value, np.float32)) for name, value in numbers.items()},
    )  # fmt: skip
    model, _ = hadamoe.load(path, kv="fp8")
    plain, _ = hadamoe.load(checkpoint("w4a16_tiny"), kv="fp8")
    want = [[0.5, 1], [2, 0.125]]
    np.testing.assert_array_equal(model.kv_choice.scales, want)
    assert plain.kv_choice.scales is None
    caches = [Decoder(m, 200) for m in (model, plain)]
    caches.append(Decoder(plain, 200, kv="fp8"))
    ids = torch.randint(0, 256, (1, 200), generator=torch.Generator().manual_seed(0))
    for decoder in caches:
        decoder.feed(ids)
    np.testing.assert_array_equal(caches[0].cache.layer(1).scales, want[1])
    np.testing.assert_array_equal(Decoder(model, 9, kv="fp8").cache.scales, want)
    codes = [c.cache.layer(1).key_pages[c.cache.table[0, 1]] for c in caches]
    np.testing.assert_array_equal(codes[1], codes[2])
    assert (codes[0] != codes[1]).any()
    keys = [decoded(c.cache, 1, 0, c.cache.lengths, 200) for c in caches[:2]]
    np.testing.assert_allclose(keys[0], keys[1], rtol=0.15, atol=0.1)
