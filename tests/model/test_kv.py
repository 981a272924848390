"""Whole models over the quantized cache: the same bits however it is used."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from recorded import checkpoint  # noqa: E402
from transformers import DynamicCache, StaticCache  # noqa: E402

import hadamoe  # noqa: E402
from hadamoe import kv_file, ops, torch_run  # noqa: E402
from hadamoe.errors import ContractError, UnsupportedError  # noqa: E402
from hadamoe.kv import PRESETS  # noqa: E402
from hadamoe.kv_cache import KVCache  # noqa: E402
from hadamoe.torch_decode import Decoder, prefix_cache, text_model  # noqa: E402
from hadamoe.torch_kv import KVChoice, PagedLayer, QuantizedCache, decoded  # noqa: E402

NAME = "stdlib_configi"
PROMPT = "class Node:\n    def __init__(self"
#: mean KL of the next token against the unquantized cache, on `text` past its second page: three
#: times what was measured
KL = {
    "bf16": 1e-6, "hk8v8": 2e-6, "hk8v4": 1.5e-4, "hk4v4": 2e-4, "hk4v3": 5e-4, "hk4v2": 1.5e-3,
    "fp8": 2e-4, "affine8": 2e-6, "affine4": 3e-4, "kivi4": 1.2e-4, "kivi2": 7e-3,
    "turbo4": 6e-4, "turbo3": 2e-3, "turbo4v2": 3e-3, "turbo2": 8e-3,
}  # fmt: skip


def text(n, seed=0):
    """Python-like bytes int64 [1, n]."""
    source = (
        PROMPT + ", value, next):\n        self.value = value\n        self.next = next\n\n"
    ) * 20
    return torch.tensor([list(source.encode()[seed * 7 : seed * 7 + n])])


@torch.no_grad()
def logits_of(model, ids, cache, sizes=None, **options):
    out = [model(part, past_key_values=cache, use_cache=True, **options).logits
           for part in ids.split(sizes or ids.shape[1], 1)]  # fmt: skip
    return torch.cat(out, 1)


@pytest.fixture(scope="module")
def quantized():
    """quantized(kv): the model loaded with it."""
    return lambda kv: hadamoe.load(checkpoint(NAME), dtype="bfloat16", kv=kv)[0]


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


@torch.no_grad()
def batched(model, ids, mask, cache):
    """Logits of ids, the last of a mask's tokens, at the positions they have alone."""
    at = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(ids, attention_mask=mask, position_ids=at, past_key_values=cache).logits


def padded(prompts):
    width = max(p.shape[1] for p in prompts)
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.int64)
    for i, p in enumerate(prompts):
        ids[i, width - p.shape[1] :], mask[i, width - p.shape[1] :] = p[0], 1
    return ids, mask


@pytest.mark.parametrize("kv", ["hk4v3", "kivi4", "fp8"])
def test_padded_batches(kv, load):
    """Padding is not stored, and a sequence has the bits it has alone."""
    model, _ = load(NAME, "bfloat16")
    prompts = [text(n, seed) for seed, n in enumerate((200, 3, 129, 64))]
    ids, mask = padded(prompts)
    cache = QuantizedCache(model, kv)
    options = {"max_new_tokens": 70, "do_sample": False, "min_new_tokens": 70}
    together = model.generate(
        ids, attention_mask=mask, past_key_values=cache, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    assert cache.kv.lengths.tolist() == [p.shape[1] + 69 for p in prompts]
    assert cache.get_seq_length() == 269
    for i, p in enumerate(prompts):
        alone = model.generate(
            p, attention_mask=torch.ones_like(p), past_key_values=QuantizedCache(model, kv),
            output_logits=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
        assert torch.equal(together.sequences[i, 200:], alone.sequences[0, p.shape[1] :])
        for a, b in zip(together.logits, alone.logits, strict=True):
            assert torch.equal(a[i], b[0])


def test_generate_samples_alike_with_the_same_seed(quantized):
    model = quantized("hk4v3")
    ids, mask = padded([text(90), text(130, 1)])
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(model.generate(
            ids, attention_mask=mask, do_sample=True, max_new_tokens=20, top_k=40, temperature=0.9,
            num_return_sequences=2,
        ))  # fmt: skip
    assert found[0].shape == (4, 150)
    assert torch.equal(*found)


def test_load_remembers_the_preset(quantized):
    """generate(), model() and the stream of `hadamoe run` use it without being told."""
    model = quantized("hk4v3")
    assert model.kv_choice.name == "hk4v3"
    ids = text(150)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20,
        return_dict_in_generate=True,
    )  # fmt: skip
    layers = [x for x in out.past_key_values.layers if isinstance(x, PagedLayer)]
    assert [x.ordinal for x in layers] == [0, 1]
    result = torch_run.stream(model, None, ids, max_tokens=20, stop=False)
    assert (result.kv, result.token_bytes) == ("hk4v3", 2 * (34 + 26))
    decoder = Decoder(model, 170)
    x = decoder.feed(ids)
    for token in out.sequences[0, 150:]:
        assert int(decoder.top(x, 1)[1]) == token
        x = decoder.feed(token.view(1, 1))
    assert decoder.cache.formats[0] == PRESETS["hk4v3"]
    assert decoder.kept()[2] == decoder.cache.nbytes
    unquantized = model(ids, use_cache=False).logits
    assert torch.equal(unquantized, hadamoe.load(checkpoint(NAME), dtype="bfloat16")[0](ids).logits)


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


def test_a_crop_takes_back_what_attention_holds(load):
    model, _ = load(NAME, "bfloat16")
    cache = QuantizedCache(model, "hk4v3")
    logits_of(model, text(200), cache)
    pages = [x for x in cache.layers if isinstance(x, PagedLayer)]
    for layer in pages:
        layer.crop(-70)
    assert cache.kv.lengths.tolist() == [130]
    assert cache.get_seq_length() == 130
    with pytest.raises(ContractError, match="would leave 120 of 130 tokens"):
        pages[0].crop(-10)
    with pytest.raises(ValueError, match="tokens_to_remove=3, needs 0 or less"):
        pages[0].crop(3)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(
        logits_of(model, text(90), cache),
        logits_of(model, text(90), QuantizedCache(model, "hk4v3")),
    )


@pytest.mark.parametrize(
    "change",
    [
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    ],
)
def test_changes_of_the_batch(change, load):
    model, _ = load(NAME, "bfloat16")
    ids, mask = padded([text(130), text(90, 1), text(70, 2)])
    cache = QuantizedCache(model, "hk4v3")
    batched(model, ids, mask, cache)
    before = cache.kv
    change[0](cache)
    assert cache.kv.lengths.tolist() == before.lengths[change[1]].tolist()
    more = text(len(change[1]) * 3, 4).view(-1, 3)
    y = batched(model, more, torch.cat([mask[change[1]], torch.ones_like(more)], 1), cache)
    for i, r in enumerate(change[1]):
        prompt = ids[r : r + 1, 130 - int(before.lengths[r]) :]
        alone = logits_of(
            model, torch.cat([prompt, more[i : i + 1]], 1), QuantizedCache(model, "hk4v3")
        )
        assert torch.equal(y[i], alone[0, -3:])
    empty = QuantizedCache(model, "hk4v3")
    change[0](empty)
    assert empty.get_seq_length() == 0


@pytest.mark.parametrize("kv", ["bf16", "hk8v8"])
def test_attention_in_parts_agrees(kv, load):
    """Where someone listens to a part, transformers' own attention runs over the same pages."""
    model, _ = load(NAME, "bfloat16")
    prompts = [text(140), text(100, 1)]
    ids, mask = padded(prompts)
    caches, found = [], []
    for parts in (False, True):
        cache = QuantizedCache(model, kv)
        handles = [
            layer.mixer.register_forward_hook(lambda *_: None)
            for layer in (text_model(model).layers if parts else ())
        ]
        with torch.no_grad():
            y = [
                model(a, attention_mask=mask[:, :n], past_key_values=cache).logits
                for a, n in ((ids[:, :130], 130), (ids[:, 130:], 140))
            ]
        for handle in handles:
            handle.remove()
        caches.append(cache)
        found.append(torch.cat(y, 1))
    assert caches[0].kv.lengths.tolist() == caches[1].kv.lengths.tolist() == [140, 100]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=0.3)
    torch.testing.assert_close(found[1][1, 40:], found[0][1, 40:], rtol=0, atol=0.3)


def test_masks_that_are_refused(load):
    model, _ = load(NAME, "bfloat16")
    ids = text(10)
    with torch.no_grad():
        for holes in ([1] * 4 + [0] * 2 + [1] * 4, [1] * 8 + [0] * 2):
            with pytest.raises(ContractError, match="not causal with padding in front"):
                model(ids, attention_mask=torch.tensor([holes]),
                      past_key_values=QuantizedCache(model, "hk8v8"))  # fmt: skip
        cache = QuantizedCache(model, "hk8v8")
        model(ids, attention_mask=torch.tensor([[0, 0, *[1] * 8]]), past_key_values=cache)
        with pytest.raises(ContractError, match="have padding, needs their attention_mask"):
            model(ids[:, :1], past_key_values=cache)
        with pytest.raises(ContractError, match="not causal with padding in front"):
            model(ids, past_key_values=cache)


def test_caches_that_cannot_be_paged_are_refused(quantized):
    model = quantized("hk4v3")
    with pytest.raises(UnsupportedError, match="a StaticCache cannot hold hk4v3"):
        model(text(5), past_key_values=StaticCache(config=model.config, max_cache_len=64))
    with pytest.raises(ContractError, match="loaded without kv, needs a preset"):
        QuantizedCache(hadamoe.load(checkpoint(NAME))[0])


def test_a_cache_of_fixed_size(quantized):
    model = quantized("hk4v3")
    cache = QuantizedCache(model, tokens=200)
    want = logits_of(model, text(200), QuantizedCache(model))
    assert torch.equal(logits_of(model, text(200), cache, [150, *[1] * 50]), want)
    assert cache.get_max_length() == 200
    with pytest.raises(ContractError, match=r"sequence 0 has 200 \+ 1 tokens, needs at most 200"):
        logits_of(model, text(1), cache)


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
