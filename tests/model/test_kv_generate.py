"""Quantized caches as transformers uses caches: generate(), batches, padding, crops, beams."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kv_support import NAME, logits_of, text  # noqa: E402
from recorded import STDLIB, TINY, checkpoint  # noqa: E402
from transformers import StaticCache  # noqa: E402

import hadamoe  # noqa: E402
from hadamoe import torch_run  # noqa: E402
from hadamoe.errors import ContractError, UnsupportedError  # noqa: E402
from hadamoe.kv import PRESETS  # noqa: E402
from hadamoe.torch_decode import Decoder, text_model  # noqa: E402
from hadamoe.torch_kv import PagedLayer, QuantizedCache  # noqa: E402


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


@pytest.mark.parametrize("name", [*TINY, *STDLIB])
def test_greedy_text_of_every_checkpoint(name, load):
    """transformers' generate() in a batch, and the chain of native calls alone: the same tokens."""
    model, _ = load(name, "bfloat16")
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (2, 150), generator=torch.Generator().manual_seed(2))
    for kv in ("hk8v8", "hk4v3", "hk4v2"):
        want = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, min_new_tokens=60,
            do_sample=False, past_key_values=QuantizedCache(model, kv),
        )[:, 150:]  # fmt: skip
        for i in (0, 1):
            decoder, found = Decoder(model, 210, kv=kv), []
            x = decoder.feed(ids[i : i + 1])
            for _ in range(60):
                found.append(int(decoder.top(x, 1)[1]))
                x = decoder.feed(torch.tensor([[found[-1]]]))
            ends = model.generation_config.eos_token_id
            if ends is None or not set(found) & set(np.atleast_1d(ends).tolist()):
                assert found == want[i].tolist()
    if model.config.get_text_config().head_dim == 32:
        with pytest.raises(ContractError, match="head_dim is 32, affine8 needs a multiple of 64"):
            hadamoe.load(checkpoint(name), kv="affine8")


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
