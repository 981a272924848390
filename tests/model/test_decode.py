"""The native token loop: transformers' text without transformers, and its way of sampling."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hadamoe import torch_run  # noqa: E402
from hadamoe.torch_decode import Decoder  # noqa: E402

NAMES = ("stdlib_configi", "stdlib_jangtq2", "stdlib_tq_apex2", "stdlib_mxfp4", "stdlib_w4a16")
PROMPT = "class Node:\n    def __init__(self"


def ids_of(text):
    return torch.tensor([list(text.encode())])


class Tokens:
    """A tokenizer of bytes that notes what it decodes."""

    def decode(self, ids, **_):
        return bytes(ids).decode("latin-1")


@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_is_that_of_generate(name, load):
    model, _ = load(name)
    ids = ids_of(PROMPT)
    want = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)
    done = torch_run.stream(model, Tokens(), ids, max_tokens=24, stop=False)
    assert done.text == bytes(want[0, ids.shape[1] :].tolist()).decode("latin-1")
    assert (done.prompt_tokens, done.new_tokens) == (ids.shape[1], 24)


def test_a_token_at_a_time_gives_the_logits_of_a_forward(load):
    model, _ = load("stdlib_jangtq2")
    ids = ids_of(PROMPT)
    with torch.no_grad():
        want = model(ids).logits[0]
    decoder = Decoder(model, ids.shape[1])
    for i in range(ids.shape[1]):
        x = decoder.feed(ids[:, i : i + 1])
        assert torch.equal(decoder.logits(x), want[i])
        values, index = decoder.top(x, 7)
        torch.testing.assert_close(values, want[i][index.long()], rtol=0, atol=1e-4)
        torch.testing.assert_close(values, want[i].topk(7).values, rtol=0, atol=1e-4)


def test_angles_of_a_long_sequence(load):
    """More positions than are computed together, in steps that straddle the edge."""
    model, _ = load("stdlib_configi")
    ids = torch.randint(0, 256, (1, 270), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids).logits[0, -1]
    decoder = Decoder(model, 270)
    for piece in ids.split([250, 5, 3, 11, 1], 1):
        x = decoder.feed(piece)
    assert torch.equal(decoder.logits(x), want)


def test_it_stops_at_the_end_token(load):
    model, _ = load("stdlib_configi")
    ids = ids_of(PROMPT)
    free = torch_run.stream(model, Tokens(), ids, max_tokens=12, stop=False)
    before = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = [free.text.encode("latin-1")[3], 300]
        done = torch_run.stream(model, Tokens(), ids, max_tokens=12)
    finally:
        model.generation_config.eos_token_id = before
    assert free.text.startswith(done.text)
    assert done.new_tokens <= 4


class Fixed:
    """A decoder whose logits are given."""

    class head:
        out_features = 6

    def __init__(self, logits):
        self.all = torch.tensor(logits)

    def logits(self, _):
        return self.all

    def top(self, _, count):
        values, index = self.all.sort(descending=True, stable=True)
        return values[:count], index[:count].int()


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.7), (None, 0.9), (4, 0.6), (0, 0.01)])
def test_sampling_has_transformers_distribution(top_k, top_p):
    from transformers import LogitsProcessorList, TemperatureLogitsWarper
    from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

    logits = [0.3, 2.0, -1.0, 1.1, 0.9, -3.0]
    warpers = [TemperatureLogitsWarper(0.8)]
    if top_k != 0:
        warpers.append(TopKLogitsWarper(top_k or 50))
    warpers.append(TopPLogitsWarper(top_p))
    want = LogitsProcessorList(warpers)(None, torch.tensor([logits])).softmax(-1)[0]
    pick, decoder = torch_run._Pick(top_k, 0.8, top_p), Fixed(logits)
    torch.manual_seed(0)
    drawn = torch.bincount(torch.tensor([pick(decoder, None) for _ in range(4000)]), minlength=6)
    assert ((drawn > 0) == (want > 0)).all()
    torch.testing.assert_close(drawn / 4000, want, rtol=0, atol=0.04)


def test_a_hook_or_a_penalty_leaves_it_to_generate(load, monkeypatch):
    model, _ = load("stdlib_configi")
    ids = ids_of("import ")
    assert torch_run._ours(model, ids)
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.3)
    assert not torch_run._ours(model, ids)
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.0)
    assert torch_run._ours(model, ids)
    seen = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    try:
        assert not torch_run._ours(model, ids)
        done = torch_run.stream(model, None, ids, max_tokens=3, stop=False)
    finally:
        handle.remove()
    assert done.new_tokens == 3
    assert len(seen) == 3
