"""mlx-lm's prompt caches with our pages: the kernels' bytes, mlx-lm's protocol, its generation."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest

from hadamoe import kv_ops, reference_kv
from hadamoe.bf16 import from_bf16, to_bf16
from hadamoe.errors import ContractError, UnsupportedError
from hadamoe.kv import PAGE, KVFormat, page_bytes

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (pip install mlx-lm)")
from mlx_lm.generate import batch_generate  # noqa: E402
from mlx_lm.models import cache as theirs  # noqa: E402

from hadamoe import mlx_host, mlx_kv  # noqa: E402
from hadamoe.mlx_cache import (  # noqa: E402
    HadamoeBatchKVCache,
    HadamoeKVCache,
    make_prompt_cache,
)

CODECS = ("h2", "h3", "h4", "h8", "affine4", "affine8", "bf16")
OTHERS = ("turbo2", "turbo3", "turbo4", "fp8", "kivi2", "kivi4")  # native on the CPU
LENGTHS = (1, 63, 64, 65, 127, 128, 129, 191, 192, 300)
FORMAT = KVFormat("h4", "h3")
B, G, D = 2, 2, 64


def rows(count, seed=0, shape=(B, G)):
    return np.random.default_rng(seed).standard_normal((2, *shape, count, D)).astype("f4")


def fed(x, chunks, form=FORMAT):
    """A cache fed keys and values x[0], x[1] in chunks, and what the last chunk was given."""
    cache, given, begin = HadamoeKVCache(form), None, 0
    for chunk in chunks:
        given = cache.update_and_fetch(*(mx.array(a[:, :, begin : begin + chunk]) for a in x))
        begin += chunk
    return cache, given


def want(x, codec, side, since):
    """What attention gets: page 0 raw, then full pages before token ``since`` as stored."""
    y, full = x.copy(), max(1, since // PAGE) * PAGE
    coded = y[:, :, PAGE:full].reshape(-1, PAGE, D)
    if len(coded):
        pages = reference_kv.kv_encode(coded, codec, side=side)
        decoded = reference_kv.kv_decode(pages, codec, D, side=side)
        y[:, :, PAGE:full] = decoded.reshape(B, G, -1, D)
    return y


def same(a, b):
    """Whether two states hold the same bits."""
    flat = [dict(theirs.tree_flatten([s])) for s in (a.state, b.state)]
    return flat[0].keys() == flat[1].keys() and all(
        np.array_equal(u, flat[1][k], equal_nan=True)
        if isinstance(u, mx.array) and u.dtype != mx.uint8
        else np.array_equal(u, flat[1][k])
        for k, u in flat[0].items()
    )


@pytest.fixture(params=["lazy", "eager"])
def route(request, monkeypatch):
    """Both ways native ops may run."""
    if request.param == "eager":
        monkeypatch.setattr(mlx_host, "bridge", None)
    elif mlx_host.bridge is None:
        pytest.skip("_mlx was not built for the installed mlx (HM_MLX=1 pip install .)")


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("codec", OTHERS)
def test_pages_of_other_software(codec, side, route):
    x = np.random.default_rng(0).standard_normal((2, 3, PAGE, D)).astype("f4")
    pages = mlx_kv.kv_encode(mx.array(x).astype(mx.bfloat16), codec, side=side)
    rounded = np.array(mx.array(x).astype(mx.bfloat16).astype(mx.float32)).reshape(6, PAGE, D)
    np.testing.assert_array_equal(
        np.array(pages).reshape(6, -1), kv_ops.kv_encode(rounded, codec, side=side)
    )
    decoded = mlx_kv.kv_decode(pages, codec, D, side=side)
    expected = kv_ops.kv_decode(np.array(pages).reshape(6, -1), codec, D, side=side)
    np.testing.assert_array_equal(np.array(decoded).reshape(6, PAGE, D), expected)
    x[1, 2, 5, 7] = np.nan
    with pytest.raises(ContractError, match="has a number that is not finite"):
        mx.eval(mlx_kv.kv_encode(mx.array(x), codec, side=side))


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_pages_have_the_kernels_bytes(codec, side, d):
    x = np.random.default_rng(d).standard_normal((4, PAGE, d)).astype("f4")
    x[0, 3], x[0, 4], x[0, 5], x[0, 6], x[0, 7, 1:] = 0, 1e-9, 1e4, -3.5, 0
    x[1] *= np.exp(np.random.default_rng(1).standard_normal(d)).astype("f4")
    x[2, 8] *= 1e6  # scales end at 65504
    pages = mlx_kv.kv_encode(mx.array(x), codec, side=side)
    assert pages.shape == (4, page_bytes(codec, d))
    np.testing.assert_array_equal(pages, kv_ops.kv_encode(x, codec, side=side))
    np.testing.assert_array_equal(pages, reference_kv.kv_encode(x, codec, side=side))
    decoded = mlx_kv.kv_decode(pages, codec, d, side=side)
    expected = reference_kv.kv_decode(np.array(pages), codec, d, side=side)
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize("codec", CODECS[:4])
def test_pages_with_means_and_balances(codec):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, PAGE, D)).astype("f4")
    vectors = rng.standard_normal(D).astype("f4"), rng.uniform(0.5, 2, D).astype("f4")
    lent = tuple(mx.array(v) for v in vectors)
    pages = mlx_kv.kv_encode(mx.array(x), codec, side="key", vectors=lent)
    np.testing.assert_array_equal(
        pages, reference_kv.kv_encode(x, codec, side="key", vectors=vectors)
    )
    decoded = mlx_kv.kv_decode(pages, codec, D, side="key", vectors=lent)
    expected = reference_kv.kv_decode(np.array(pages), codec, D, side="key", vectors=vectors)
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize("codec", CODECS)
def test_nan_stays_where_it_is(codec):
    x = rows(PAGE)[0]
    x[0, 0, 7, 5] = x[1, 1, 9, 0] = np.nan
    pages = mlx_kv.kv_encode(mx.array(x), codec, side="value")
    y = np.array(mlx_kv.kv_decode(pages, codec, D, side="value"))
    nan = [row for row in np.ndindex(B, G, PAGE) if np.isnan(y[row]).any()]
    assert nan == [(0, 0, 7), (1, 1, 9)]
    assert np.isfinite(y).sum() >= y.size - 2 * D


@pytest.mark.parametrize("form", [FORMAT, KVFormat("h8", "h2"), KVFormat("affine8", "bf16")])
@pytest.mark.parametrize("count", LENGTHS)
def test_what_attention_is_given(count, form):
    x = rows(count)
    chunkings = [[count], [1] * min(count, 130) + [count - 130] * (count > 130)]
    chunkings += [[count // 3, count - count // 3]] if count > 2 else []
    caches = []
    for chunks in chunkings:
        cache, given = fed(x, chunks, form)
        caches.append(cache)
        for got, plain, codec, side in zip(given, x, form, ("key", "value"), strict=True):
            expected = want(plain, codec, side, count - chunks[-1])
            np.testing.assert_array_equal(got, expected)
        for got, plain, codec, side in zip(
            cache.keys_and_values(), x, form, ("key", "value"), strict=True
        ):
            np.testing.assert_array_equal(got, want(plain, codec, side, count))
    assert all(same(caches[0], c) for c in caches[1:])
    assert caches[0].offset == caches[0].size() == count
    assert not caches[0].empty()


@pytest.mark.parametrize(("form", "most"), [(KVFormat("h8", "h8"), 0.01), (FORMAT, 0.05)])
def test_beside_attention_on_codes(form, most):
    """The kernels' cache has the same pages; they round the query too and correct stored values."""
    count, (k, v) = 300, rows(300, shape=(1, G))
    q = np.random.default_rng(5).standard_normal((1, 2 * G, count, D)).astype("f4")
    raw = [np.zeros((1, G, 3, PAGE, D), np.float32) for _ in form]
    pages = [np.zeros((5, G, page_bytes(c, D)), np.uint8) for c in form]
    layer = kv_ops.KVLayer(form, *raw, *pages, np.arange(5, dtype=np.int32)[None])
    y = kv_ops.kv_attend(*(np.ascontiguousarray(a.swapaxes(1, 2)) for a in (q, k, v)), layer, [0])
    cache = HadamoeKVCache(form)
    for i in range(count):
        given = cache.update_and_fetch(*(mx.array(a[:, :, i : i + 1]) for a in (k, v)))
        token = mx.array(q[:, :, i : i + 1])
        z = mx.fast.scaled_dot_product_attention(token, *given, scale=D**-0.5, mask=None)
        error = np.linalg.norm(y[:, i] - np.array(z)[:, :, 0]) / np.linalg.norm(y[:, i])
        assert error < (most if i >= 2 * PAGE else 1e-5), i
    for side, stored in zip(cache.sides, pages, strict=True):
        np.testing.assert_array_equal(np.array(side.pages)[0].swapaxes(0, 1), stored[1:4])


@pytest.mark.parametrize("count", LENGTHS)
def test_bytes(count):
    cache, _ = fed(rows(count).astype("f2"), [count])
    token, coded = B * G * D * 2, max(0, count // PAGE - 1)
    newest = max(0, count - max(1, count // PAGE - 1) * PAGE)
    raw = 2 * token * (min(count, PAGE) + newest)
    assert cache.nbytes == raw + B * G * coded * sum(page_bytes(c, D) for c in FORMAT)
    assert HadamoeKVCache(FORMAT).nbytes == 0


def test_bf16_rows():
    x = rows(300)
    cache, plain = HadamoeKVCache(FORMAT), mx.array(x).astype(mx.bfloat16)
    cache.update_and_fetch(*plain[:, :, :, :299])
    keys, _ = cache.update_and_fetch(*plain[:, :, :, 299:])
    assert keys.dtype == mx.bfloat16
    rounded = np.array(plain[0].astype(mx.float32))
    expected = want(rounded, "h4", "key", 299)
    np.testing.assert_array_equal(keys.astype(mx.float32), from_bf16(to_bf16(expected)))


@pytest.mark.parametrize(
    ("count", "n"),
    [
        (5, 2), (5, 9), (64, 1), (65, 3), (130, 64), (200, 70), (300, 64), (300, 236), (300, 300),
        (700, 60), (700, 636), (704, 64), (704, 128), (704, 640),
    ],
)  # fmt: skip
def test_trim_leaves_no_trace(count, n):
    x, other = rows(count), rows(200, seed=1)
    cache, _ = fed(x, [count])
    assert cache.is_trimmable()
    assert cache.trim(n) == min(n, count)
    left = max(0, count - n)
    np.testing.assert_array_equal(
        cache.keys_and_values()[0], want(x[0][:, :, :left], "h4", "key", left)
    )
    cache.update_and_fetch(*map(mx.array, other))
    straight, _ = fed(np.concatenate([x[..., :left, :], other], -2), [left, 200][left == 0 :])
    assert same(cache, straight)
    for a, b in zip(cache.keys_and_values(), straight.keys_and_values(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("count", "n", "least"), [(300, 109, 192), (704, 65, 640), (300, 235, 192)]
)
def test_trim_refuses_what_would_not_be_exact(count, n, least):
    cache, _ = fed(rows(count), [count])
    before = copy.copy(cache)
    message = (
        f"trim: n={n} leaves {count - n} of {count} tokens, needs a multiple of 64, less than 64, "
        f"or at least {least}"
    )
    with pytest.raises(ContractError, match=re.escape(message)):
        cache.trim(n)
    assert same(cache, before)
    assert cache.trim(count - least) == count - least


def test_state_is_saved_by_mlx_lm(tmp_path):
    file = str(tmp_path / "cache.safetensors")
    x = rows(330)
    saved = [fed(x, [count])[0] for count in (3, 64, 300)] + [HadamoeKVCache(FORMAT)]
    saved.append(HadamoeKVCache.merge([fed(rows(70, shape=(1, G)), [70])[0]]))
    theirs.save_prompt_cache(file, saved, {"model": "m"})
    loaded, metadata = theirs.load_prompt_cache(file, return_metadata=True)
    assert metadata == {"model": "m"}
    assert [type(c) for c in loaded] == [HadamoeKVCache] * 4 + [HadamoeBatchKVCache]
    assert all(same(a, b) for a, b in zip(saved, loaded, strict=True))
    assert [c.nbytes for c in loaded] == [c.nbytes for c in saved]
    new = [mx.array(a[:, :, 300:]) for a in x]
    given = [c.update_and_fetch(*new) for c in (saved[2], loaded[2])]
    np.testing.assert_array_equal(given[0][0], given[1][0])
    assert loaded[3].empty()
    loaded[3].update_and_fetch(*new)
    assert loaded[3].offset == 30


def test_a_copy_goes_its_own_way():
    cache, _ = fed(rows(100), [100])
    other = copy.deepcopy(cache)
    other.update_and_fetch(*map(mx.array, rows(100, seed=2)))
    assert same(cache, fed(rows(100), [100])[0])
    cache.update_and_fetch(*map(mx.array, rows(100, seed=2)))
    assert same(cache, other)


def test_steps_are_compiled():
    """Nothing is computed while a step is traced: state goes in and comes out as arrays."""
    x = mx.array(rows(140))

    def step(state, keys, values):
        cache = HadamoeKVCache.from_state(state)
        y = mx.fast.scaled_dot_product_attention(
            keys, *cache.update_and_fetch(keys, values), scale=D**-0.5, mask=None
        )
        return y, cache.state

    compiled = mx.compile(step)
    plain, _ = fed(np.array(x[:, :, :, :126]), [126])
    state = plain.state
    for i in range(126, 130):  # page 1 is full after two
        keys, values = x[:, :, :, i : i + 1]
        y, state = compiled(state, keys, values)
        expected = step(plain.state, keys, values)[0]
        plain.update_and_fetch(keys, values)
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-7)
    assert same(HadamoeKVCache.from_state(state), plain)


@pytest.fixture(scope="module")
def model(checkpoint):
    model, tokenizer = mlx_lm.load(str(checkpoint("stdlib_bf16")))
    model.set_dtype(mx.float32)  # the CPU has no bf16 mixture of experts
    heldout = (checkpoint("stdlib_bf16") / "heldout.txt").read_text()
    return SimpleNamespace(model=model, tokenizer=tokenizer, text=heldout)


def test_caches_of_a_model(model):
    caches = make_prompt_cache(model.model, ["hk8v4", "bf16"])
    assert [type(c) for c in caches] == [
        *[theirs.ArraysCache] * 3, HadamoeKVCache, *[theirs.ArraysCache] * 3, theirs.KVCache
    ]  # fmt: skip
    assert caches[3].format == ("h8", "h4")


def log_softmax(model, tokens, kv):
    """Of a text's logits ``[400, n]``, fed in chunks of 100."""
    cache = make_prompt_cache(model.model, kv)
    parts = [model.model(tokens[None, i : i + 100], cache=cache)[0] for i in range(0, 400, 100)]
    logits = mx.concatenate(parts)
    return logits - mx.logsumexp(logits, -1, keepdims=True)


def test_logits(model):
    """KL divergence from mlx-lm's own cache, per token."""
    tokens = mx.array(model.tokenizer.encode(model.text[:400]))
    p, kl = log_softmax(model, tokens, "bf16"), {}
    for kv in ("hk8v8", "hk4v4", "hk4v2"):
        kl[kv] = np.array((mx.exp(p) * (p - log_softmax(model, tokens, kv))).sum(-1))
        assert np.abs(kl[kv][:200]).max() < 1e-6  # nothing is read from codes yet
    mean = {kv: float(a[200:].mean()) for kv, a in kl.items()}
    assert 0 < mean["hk8v8"] < mean["hk4v4"] < mean["hk4v2"], mean
    assert mean["hk8v8"] < 2e-5, mean
    assert mean["hk4v2"] < 2e-3, mean


def test_generation(model):
    def generate(cache):
        options = {"prompt": model.text[:200], "max_tokens": 80, "prompt_cache": cache}
        return mlx_lm.generate(model.model, model.tokenizer, **options)

    cache = make_prompt_cache(model.model, "hk8v8")
    assert generate(cache) == generate(None)
    assert cache[3].offset == cache[7].offset == 200 + 80


def test_batched_generation(model):
    """Prompts of many lengths, padded, in chunks: each as it would be alone, and its pages too."""
    prompts = [model.tokenizer.encode(model.text[i : i + n]) for i, n in ((0, 200), (300, 130))]
    prompts.append(model.tokenizer.encode(model.text[500:503]))
    caches = [make_prompt_cache(model.model, "hk8v8") for _ in prompts]
    options = {"max_tokens": 40, "prefill_step_size": 70}
    got = batch_generate(
        model.model, model.tokenizer, prompts, prompt_caches=caches, return_prompt_caches=True,
        **options,
    )  # fmt: skip
    plain = batch_generate(model.model, model.tokenizer, prompts, **options)
    assert got.texts == plain.texts
    for prompt, cache in zip(prompts, got.caches, strict=True):
        alone = make_prompt_cache(model.model, "hk8v8")
        mlx_lm.generate(model.model, model.tokenizer, prompt, prompt_cache=alone, **options)
        assert cache[3].offset == alone[3].offset
        assert cache[3].nbytes == alone[3].nbytes


def test_batches_hold_the_pages_of_single_sequences():
    lengths, t = [0, 70, 190], 80
    x = [rows(n + 2 * t, seed=n, shape=(1, G)) for n in lengths]
    alone = [fed(a[..., :n, :], [n] if n else [])[0] for a, n in zip(x, lengths, strict=True)]
    batch = HadamoeKVCache.merge(alone)
    batch.prepare(lengths=[t, t - 1, 3], right_padding=[0, 1, t - 3])
    mask = batch.make_mask(t)
    assert mask.shape == (3, 1, t, 190 + t)
    new = [a[..., n : n + t, :] for a, n in zip(x, lengths, strict=True)]
    keys, _ = batch.update_and_fetch(*mx.array(np.concatenate(new, 1)))
    batch.finalize()
    assert keys.shape == (3, G, 190 + t, D)
    for i, (c, a, n, count) in enumerate(zip(alone, x, lengths, [t, t - 1, 3], strict=True)):
        given, _ = c.update_and_fetch(*(mx.array(s[..., n : n + count, :]) for s in a))
        shown = np.array(keys)[i][:, np.array(mask)[i, 0, count - 1]]
        np.testing.assert_array_equal(shown, np.array(given)[0])
        assert same(batch.extract(i), c)
    assert batch.offset.tolist() == [80, 149, 193]
    assert batch.nbytes == sum(c.nbytes for c in alone)
    batch.filter([2, 0])
    batch.extend(HadamoeKVCache.merge([alone[1]]))
    assert batch.offset.tolist() == [193, 80, 149]
    assert batch.trim(60) == 60
    assert batch.offset.tolist() == [133, 20, 89]
    assert [c.offset for c in alone] == [80, 149, 193]


def test_other_refusals(model):
    with pytest.raises(ContractError, match="has 3 presets, needs one or 2"):
        make_prompt_cache(model.model, ["hk4v3"] * 3)
    sliding = SimpleNamespace(make_cache=lambda: [theirs.KVCache(), theirs.RotatingKVCache(8)])
    with pytest.raises(UnsupportedError, match="kv: layer 1 has a RotatingKVCache"):
        make_prompt_cache(sliding, "hk4v3")
    with pytest.raises(ContractError, match="head_dim is 96, h4 needs"):
        HadamoeKVCache(FORMAT).update_and_fetch(*mx.zeros((2, 1, 1, 1, 96)))
    with pytest.raises(UnsupportedError, match="padded on the left"):
        HadamoeKVCache.merge([HadamoeKVCache(FORMAT)]).prepare(left_padding=[1])
