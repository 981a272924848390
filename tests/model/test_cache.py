"""GrowingLayer is transformers' DynamicLayer with another memory."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import DynamicCache  # noqa: E402
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer  # noqa: E402

from hadamoe.torch_cache import FIRST, GrowingLayer, claim  # noqa: E402
from hadamoe.torch_decode import text_model  # noqa: E402

PROMPT = torch.tensor([list(b"class Node:\n    def __init__(self")])


def states(batch, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, 2, tokens, 4, generator=generator).unbind()


def both():
    """(theirs, ours) after the same updates."""
    layers = DynamicLayer(), GrowingLayer()
    for seed, tokens in enumerate((3, 1, FIRST + 5, 1)):
        for layer in layers:
            layer.update(*states(2, tokens, seed))
    return layers


def same(theirs, ours):
    assert theirs.get_seq_length() == ours.get_seq_length()
    assert theirs.get_mask_sizes(3) == ours.get_mask_sizes(3)
    assert torch.equal(theirs.keys, ours.keys)
    assert torch.equal(theirs.values, ours.values)


def test_updates_grow_by_doubling():
    theirs, ours = both()
    same(theirs, ours)
    room = ours.room[0].data_ptr()
    ours.update(*states(2, 1))
    assert ours.room[0].data_ptr() == room


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-7),
        lambda layer: layer.crop(0),
        lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: layer.batch_select_indices(torch.tensor([False, True])),
    ],
)
def test_changes_mean_what_they_mean_in_transformers(change):
    theirs, ours = both()
    for layer in (theirs, ours):
        change(layer)
    same(theirs, ours)
    more = states(len(theirs.keys), 2, 9)
    for layer in (theirs, ours):
        layer.update(*more)
    same(theirs, ours)


def test_reset_and_positive_crop():
    _, ours = both()
    with pytest.raises(ValueError, match="tokens_to_remove=3, needs 0 or less"):
        ours.crop(3)
    ours.reset()
    assert (ours.get_seq_length(), ours.keys, ours.is_initialized) == (0, None, False)
    ours.batch_repeat_interleave(2)  # of nothing
    assert torch.equal(ours.update(*states(1, 2))[0], states(1, 2)[0])


def test_claim_takes_over_what_a_cache_holds():
    cache = DynamicCache()
    cache.update(*states(1, 3), 0)
    keys, values, past = claim(cache, 0, (1, 2, 4), 2, torch.float32)
    assert (past, cache.get_seq_length()) == (3, 5)
    assert torch.equal(keys[:, :, :3], states(1, 3)[0])
    assert keys.shape == values.shape == (1, 2, FIRST, 4)
    assert claim(None, 0, (1, 2, 4), 2, torch.float32)[2] == 0
    cache.layers[0] = DynamicSlidingWindowLayer(sliding_window=8)
    assert claim(cache, 0, (1, 2, 4), 2, torch.float32) is None
    assert claim(cache, 5, (1, 2, 4), 2, torch.float32) is None


def test_a_model_fills_it_and_continues_after_a_crop(load):
    model, _ = load("stdlib_configi")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(PROMPT, past_key_values=cache, use_cache=True)
    kinds = {type(layer) for layer in cache.layers}
    assert GrowingLayer in kinds
    assert DynamicLayer not in kinds


def test_attention_in_parts_agrees(load):
    """Where someone listens to a part, transformers' own attention runs over the same cache."""
    model, _ = load("stdlib_jangtq2")
    seen = []
    with torch.no_grad():
        want = model(PROMPT).logits
        first = model(PROMPT[:, :9], use_cache=True)
        handles = [
            layer.mixer.register_forward_hook(lambda *_: seen.append(1))
            for layer in text_model(model).layers
        ]
        try:
            rest = model(PROMPT[:, 9:], past_key_values=first.past_key_values).logits
        finally:
            for handle in handles:
                handle.remove()
    assert len(seen) == len(handles)
    torch.testing.assert_close(rest, want[:, 9:], rtol=0, atol=2e-5)


def test_eager_attention_returns_its_weights(load):
    model, _ = load("stdlib_mxfp4")
    with torch.no_grad():
        want = model(PROMPT).logits
        model.set_attn_implementation("eager")
        try:
            out = model(PROMPT, output_attentions=True)
        finally:
            model.set_attn_implementation("sdpa")
        again = model(PROMPT, output_hidden_states=True)
    assert out.attentions[0].shape[-2:] == (PROMPT.shape[1],) * 2
    torch.testing.assert_close(out.logits, want, rtol=0, atol=2e-5)
    assert torch.equal(again.logits, want)
    assert len(again.hidden_states) == len(text_model(model).layers) + 1
