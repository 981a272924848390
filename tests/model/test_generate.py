"""transformers' generate() over our layers: batches, beams, sampling, streaming, caches."""

from __future__ import annotations

import threading

import pytest

torch = pytest.importorskip("torch")

NAMES = ("stdlib_configi", "stdlib_jangtq2", "stdlib_tq_apex2")
PROMPTS = ("import os\nimport ", "def f(", "class Node:\n    def __init__(self")
PAD = 258


def ids_of(text):
    return torch.tensor([list(text.encode())])


def left_padded(prompts):
    width = max(len(p) for p in prompts)
    rows = [[PAD] * (width - len(p)) + list(p.encode()) for p in prompts]
    ids = torch.tensor(rows)
    return ids, (ids != PAD).long()


def continue_(model, ids, count=12, **options):
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": PAD} | options
    return model.generate(ids, **options)[:, ids.shape[1] :]


@pytest.mark.parametrize("name", NAMES)
def test_padded_batch_equals_single_prompts(name, load):
    model, _ = load(name)
    ids, mask = left_padded(PROMPTS)
    with torch.no_grad():
        batch = model(ids, attention_mask=mask).logits[:, -1]
        single = torch.cat([model(ids_of(p)).logits[:, -1] for p in PROMPTS])
    torch.testing.assert_close(batch, single, rtol=0, atol=1e-4)
    together = continue_(model, ids, attention_mask=mask)
    alone = torch.cat([continue_(model, ids_of(p)) for p in PROMPTS])
    assert torch.equal(together, alone)


def test_a_prompt_after_a_batch_starts_afresh(load):
    """transformers keeps the batch's position offsets in a model with a vision tower."""
    model, _ = load("stdlib_jangtq2")
    prompt = ids_of(PROMPTS[2])
    ids, mask = left_padded(PROMPTS)
    continue_(model, ids, attention_mask=mask, count=2)
    with torch.no_grad():
        whole = model(prompt).logits
        begin = model(prompt[:, :-1], use_cache=True)
        last = model(prompt[:, -1:], past_key_values=begin.past_key_values).logits
    torch.testing.assert_close(last, whole[:, -1:], rtol=0, atol=2e-5)


def test_sampling_repeats_with_its_seed(load):
    model, _ = load("stdlib_configi")
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(
            continue_(model, ids_of(PROMPTS[0]), 24, do_sample=True, temperature=0.9, top_p=0.95)
        )
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_streaming_yields_the_generated_text(load):
    from transformers import TextIteratorStreamer

    model, tokenizer = load("stdlib_w4a16")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    options = {"max_new_tokens": 16, "do_sample": False, "streamer": streamer, "pad_token_id": PAD}
    worker = threading.Thread(target=model.generate, kwargs={**inputs, **options})
    worker.start()
    pieces = list(streamer)
    worker.join()
    want = continue_(model, inputs.input_ids, 16)[0]
    assert len(pieces) > 1
    assert "".join(pieces) == tokenizer.decode(want)


def test_beam_search_reorders_the_recurrent_state(load):
    """The best beam's score is the one a plain forward gives its tokens."""
    model, _ = load("stdlib_mxfp4")
    ids = ids_of(PROMPTS[1])
    out = model.generate(
        ids, max_new_tokens=10, num_beams=4, do_sample=False, eos_token_id=None, pad_token_id=PAD,
        return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    tokens = out.sequences[:, ids.shape[1] :]
    with torch.no_grad():
        logp = model(out.sequences).logits[:, ids.shape[1] - 1 : -1].log_softmax(-1)
    score = logp.gather(-1, tokens[..., None]).sum()
    torch.testing.assert_close(out.sequences_scores[0], score, rtol=0, atol=1e-3)


def test_generation_continues_from_a_cache(load):
    model, _ = load("stdlib_jangtq2")
    ids = ids_of(PROMPTS[2])
    whole = continue_(model, ids, 16)
    first = model.generate(
        ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, pad_token_id=PAD
    )
    rest = continue_(model, first.sequences, 8, past_key_values=first.past_key_values)
    assert torch.equal(torch.cat([first.sequences[:, ids.shape[1] :], rest], 1), whole)


def test_static_cache_gives_the_same_text(load):
    model, _ = load("stdlib_configi")
    ids = ids_of(PROMPTS[0])
    static = continue_(model, ids, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, continue_(model, ids))


def test_bf16_generates(load):
    model, _ = load("stdlib_tq_apex2", "bfloat16")
    assert model.dtype == torch.bfloat16
    text = bytes(continue_(model, ids_of(PROMPTS[2]), 24)[0].tolist())
    assert text.startswith(b", ")


def test_a_recording_cache_is_refused(load):
    from transformers import DynamicCache

    import hadamoe

    model, _ = load("stdlib_configi")
    cache = DynamicCache(config=model.config)
    cache.layers[0].activate_past_recording()
    with pytest.raises(hadamoe.UnsupportedError, match="records past states"):
        model(ids_of("a"), past_key_values=cache, use_cache=True)
