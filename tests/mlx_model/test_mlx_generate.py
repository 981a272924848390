"""mlx-lm's generation over our layers: batches, padding, its caches and ours, prompt caches."""

from __future__ import annotations

import copy

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
mlx_lm = pytest.importorskip(
    "mlx_lm", reason="mlx-lm is not installed (pip install 'hadamoe[mlx]')"
)
from mlx_lm.generate import BatchGenerator, generate_step  # noqa: E402
from mlx_lm.models import cache as caches  # noqa: E402

from hadamoe.mlx_cache import HadamoeKVCache, make_prompt_cache  # noqa: E402

NAME = "stdlib_jangtq2"
#: two orders of the same f32 sums, over logits up to 20
ROUNDING = 3e-5


@pytest.fixture(scope="module")
def text(checkpoint):
    return (checkpoint("stdlib_bf16") / "heldout.txt").read_bytes()


def ids(text, begin, count):
    return mx.array([list(text[begin : begin + count])])


def logits(model, tokens, cache):
    return np.array(model(tokens, cache=cache))


def states(cache):
    """Arrays of linear attention's states."""
    return [np.array(a) for c in cache if isinstance(c, caches.ArraysCache) for a in c.cache]


@pytest.mark.parametrize("kv", ["bf16", "hk8v4"])
def test_padding_leaves_no_trace(kv, load, text):
    """A batch as mlx-lm makes it: prompts padded behind, in chunks, then single tokens."""
    model, _ = load(NAME, kv=kv)
    lengths, chunk = [90, 3, 41], 32
    alone = [model.make_cache() for _ in lengths]
    batch = [c[0].merge(c) for c in zip(*(model.make_cache() for _ in lengths), strict=True)]
    rows = [ids(text, 100 * i, n) for i, n in enumerate(lengths)]
    width = max(lengths)
    padded = mx.concatenate([mx.pad(r, [(0, 0), (0, width - r.shape[1])]) for r in rows])
    for c in batch:
        c.prepare(lengths=lengths, right_padding=[width - n for n in lengths])
    for begin in range(0, width, chunk):
        model(padded[:, begin : begin + chunk], cache=batch)
    for c in batch:
        c.finalize()
    for row, cache in zip(rows, alone, strict=True):
        for begin in range(0, row.shape[1], chunk):
            model(row[:, begin : begin + chunk], cache=cache)
    for together, apart in zip(states(batch), zip(*map(states, alone), strict=True), strict=True):
        assert np.abs(together - np.concatenate(apart)).max() < ROUNDING
    token = mx.array([[5], [6], [7]])
    got = logits(model, token, batch)
    want = np.concatenate([logits(model, token[i : i + 1], c) for i, c in enumerate(alone)])
    assert np.abs(got - want).max() < ROUNDING
    again = logits(model, token[1:2], [c.extract(1) for c in batch])
    assert np.abs(again - logits(model, token[1:2], alone[1])).max() < ROUNDING


def test_padding_in_front(load, text):
    """Left padding, as mlx-lm's batch caches are told when they are made."""
    model, _ = load(NAME)
    padding = [0, 5]
    cache = [
        caches.ArraysCache(2, padding) if layer.is_linear else caches.BatchKVCache(padding)
        for layer in model.layers
    ]
    rows = [ids(text, 0, 20), ids(text, 300, 15)]
    batch = mx.concatenate([rows[0], mx.pad(rows[1], [(0, 0), (5, 0)])])
    got = [logits(model, batch[:, :3], cache), logits(model, batch[:, 3:], cache)]
    got = np.concatenate(got, 1)
    for i, row in enumerate(rows):
        want = logits(model, row, model.make_cache())
        assert np.abs(got[i, padding[i] :] - want[0]).max() < ROUNDING


def test_sequences_join_and_leave_a_running_batch(load, text):
    """BatchGenerator: prompts of other lengths come while others are generated."""
    model, _ = load(NAME)
    prompts = [list(text[i : i + n]) for i, n in ((0, 60), (100, 7), (200, 33))]
    counts = [30, 9, 21]
    alone = [
        [int(token) for token, _ in generate_step(mx.array(p), model, max_tokens=n)]
        for p, n in zip(prompts, counts, strict=True)
    ]
    generator = BatchGenerator(model, prefill_step_size=16, completion_batch_size=2)
    uids = generator.insert(prompts[:2], counts[:2])
    found: dict[int, list[int]] = {}
    for i in range(200):
        if i == 5:
            uids += generator.insert(prompts[2:], counts[2:])
        _, responses = generator.next()
        for r in responses:
            found.setdefault(r.uid, []).append(r.token)
    generator.close()
    assert [found[uid] for uid in uids] == alone


@pytest.mark.parametrize("kv", ["hk8v8", "hk4v3", "affine8", "turbo4v2", "h8/h4,bf16"])
def test_quantized_caches_unasked(kv, load, checkpoint, text):
    """load(kv=) is enough: generate and batch_generate fill the caches it names."""
    presets = tuple(kv.split(",")) if "," in kv else kv
    model, tokenizer = load(NAME, "bfloat16", kv=presets)
    kinds = [type(c) for c in model.make_cache() if not isinstance(c, caches.ArraysCache)]
    assert kinds == [HadamoeKVCache, caches.KVCache if "," in kv else HadamoeKVCache]
    assert [type(c) for c in make_prompt_cache(model, "hk8v4")].count(HadamoeKVCache) == 2
    prompts = [list(text[i : i + n]) for i, n in ((0, 200), (300, 130), (500, 4))]
    texts = [mlx_lm.generate(model, tokenizer, p, max_tokens=20) for p in prompts]
    batch = mlx_lm.batch_generate(
        model, tokenizer, prompts, max_tokens=20, return_prompt_caches=True, prefill_step_size=64
    )
    assert [t.lstrip() for t in batch.texts] == [t.lstrip() for t in texts]
    for prompt, cache in zip(prompts, batch.caches, strict=True):
        layer = next(c for c in cache if isinstance(c, HadamoeKVCache))
        assert layer.offset == len(prompt) + 20
    if kv == "hk8v8":
        plain, _ = load(NAME, "bfloat16")
        assert texts == [mlx_lm.generate(plain, tokenizer, p, max_tokens=20) for p in prompts]


@pytest.mark.parametrize("bits", [4, 8])
def test_mlx_lms_own_quantized_cache(bits, load, text):
    model, tokenizer = load(NAME)
    prompt, options = list(text[:150]), {"max_tokens": 24}
    plain = mlx_lm.generate(model, tokenizer, prompt, **options)
    cache = model.make_cache()
    coded = mlx_lm.generate(
        model, tokenizer, prompt, kv_bits=bits, kv_group_size=32, quantized_kv_start=0,
        prompt_cache=cache, **options,
    )  # fmt: skip
    assert isinstance(cache[3], caches.QuantizedKVCache)
    assert coded == plain if bits == 8 else len(coded) > 0


@pytest.mark.parametrize("kv", ["bf16", "hk4v3"])
def test_prompt_caches_are_saved_and_go_their_own_way(kv, load, text, tmp_path):
    model, _ = load(NAME, kv=kv)
    cache, file = model.make_cache(), str(tmp_path / "prompt.safetensors")
    model(ids(text, 0, 150), cache=cache)
    caches.save_prompt_cache(file, cache, {"model": "m"})
    loaded, metadata = caches.load_prompt_cache(file, return_metadata=True)
    copied = copy.deepcopy(cache)
    assert metadata == {"model": "m"}
    want = logits(model, ids(text, 150, 40), cache)
    for other in (loaded, copied):  # the first one's tokens left no trace in them
        np.testing.assert_array_equal(logits(model, ids(text, 150, 40), other), want)
    assert not caches.can_trim_prompt_cache(cache)  # states of linear attention have no way back
    assert caches.trim_prompt_cache(cache, 1) == 0


def test_a_call_leaves_the_states_it_was_given(load, text):
    model, _ = load(NAME)
    cache = model.make_cache()
    model(ids(text, 0, 9), cache=cache)
    held = [a for c in cache if isinstance(c, caches.ArraysCache) for a in c.cache]
    before = [np.array(a) for a in held]
    model(ids(text, 9, 9), cache=cache)
    for now, then, after in zip(held, before, states(cache), strict=True):
        np.testing.assert_array_equal(now, then)
        assert (then != after).any()


def test_streaming(load):
    model, tokenizer = load(NAME)
    parts = list(mlx_lm.stream_generate(model, tokenizer, "def fib(n):", max_tokens=12))
    assert "".join(p.text for p in parts) == mlx_lm.generate(
        model, tokenizer, "def fib(n):", max_tokens=12
    )
    assert len(parts) > 3
    assert parts[-1].finish_reason in ("length", "stop")
