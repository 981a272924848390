"""mlx-lm's caches of coded pages on Metal: tokens attended where they are stored."""

from __future__ import annotations

import copy

import mlx.core as mx
import numpy as np
import pytest
from simt import metal

from hadamoe import kv_ops, mlx_gpu_kv
from hadamoe.kv import PAGE, KVFormat, page_bytes

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (pip install mlx-lm)")
from mlx_lm.models import cache as theirs

from hadamoe.mlx_cache import HadamoeKVCache
from hadamoe.mlx_static import HadamoeStaticKVCache

pytestmark = pytest.mark.skipif(metal.missing() is not None, reason=str(metal.missing()))

FORM = KVFormat("h4", "h3")
H, G, D = 4, 2, 64
WIDTH = 2 * H + 2 * G


def projections(count: int, batch: int = 1, seed: int = 0) -> np.ndarray:
    """f32 ``[b, tokens, heads, d]``: query and gate of each head, keys, values."""
    x = np.random.default_rng(seed).standard_normal((batch, count, WIDTH, D))
    return x.astype(np.float32)


def keys_and_values(x: np.ndarray) -> list[mx.array]:
    kv = x[:, :, 2 * H :].swapaxes(1, 2)
    return [mx.array(kv[:, :G]), mx.array(kv[:, G:])]


def prepared(x: np.ndarray):
    """A token's projection as it goes to `attend`: no norm, no positions."""
    proj = mx.array(x.reshape(*x.shape[:2], -1))
    return mlx_gpu_kv.prepare(proj, (H, G), D, None, None, 0, form=FORM), proj


def want(x: np.ndarray) -> np.ndarray:
    """Gated attention of all tokens by the CPU's kernels ``[b, t, h, d]``."""
    b, t = x.shape[:2]
    raw = [np.zeros((b, G, 3, PAGE, D), np.float32) for _ in FORM]
    m = t // PAGE + 1
    pages = [np.zeros((b * m, G, page_bytes(c, D)), np.uint8) for c in FORM]
    table = np.arange(b * m, dtype=np.int32).reshape(b, m)
    layer = kv_ops.KVLayer(FORM, *raw, *pages, table)
    parts = [x[:, :, : 2 * H : 2], x[:, :, 2 * H : 2 * H + G], x[:, :, 2 * H + G :]]
    y = kv_ops.kv_attend(*map(np.ascontiguousarray, parts), layer, [0] * b)
    return y / (1 + np.exp(-x[:, :, 1 : 2 * H : 2].astype(np.float64)))


def close(y: mx.array, expected: np.ndarray) -> None:
    y = np.array(y).reshape(expected.shape)
    assert np.abs(y - expected).max() <= 3e-5 * np.abs(expected).max()


def same(a, b) -> bool:
    flat = [dict(theirs.tree_flatten([s])) for s in (a.state, b.state)]
    return flat[0].keys() == flat[1].keys() and all(
        np.array_equal(u, flat[1][k]) for k, u in flat[0].items()
    )


def fed(x: np.ndarray, count: int) -> HadamoeKVCache:
    cache = HadamoeKVCache(FORM)
    cache.update_and_fetch(*keys_and_values(x[:, :count]))
    return cache


@pytest.mark.parametrize("prompt", [1, 63, 100, 128, 190])
def test_tokens_after_a_prompt(prompt):
    """Each token as the CPU's attention has it, over pages' ends; then the cache is what any other
    way of filling it leaves."""
    x, count = projections(prompt + 80, seed=prompt), prompt + 80
    expected = want(x)
    with metal.installed() as log:
        cache = fed(x, prompt)
        assert cache.attends
        for i in range(prompt, count):
            del log[:]
            token, proj = prepared(x[:, i : i + 1])
            close(cache.attend(token, proj), expected[:, i])
            full = 2 if (i + 1) % PAGE == 0 and i >= PAGE else 0  # keys and values of a page
            assert len(log) == (3 if i >= 2 * PAGE else 2) + full
        assert cache.offset == count
        assert same(cache, fed(x, count))
    assert cache.attends == mx.metal.is_available()  # the simulator is gone, a device is not


def test_a_batch_of_lengths():
    """All sequences in the launches of one; each has the pages it would have alone, whoever comes
    and goes."""
    starts, steps = [5, 120, 188], 20
    x = [projections(n + steps, seed=n) for n in starts]
    expected = [want(a)[0] for a in x]
    with metal.installed() as log:
        batch = HadamoeKVCache.merge([fed(a, n) for a, n in zip(x, starts, strict=True)])
        assert batch.attends
        rows = [0, 1, 2]

        def step(i):
            token, proj = prepared(np.concatenate([x[r][:, starts[r] + i][:, None] for r in rows]))
            for y, r in zip(np.array(batch.attend(token, proj)), rows, strict=True):
                close(y, expected[r][starts[r] + i])

        for i in range(10):
            del log[:]
            step(i)
            stored = sum((starts[r] + i + 1) % PAGE == 0 for r in rows)
            assert len(log) == 3 + 2 * stored
        assert batch.offset.tolist() == [15, 130, 198]
        for i, r in enumerate(rows):
            assert same(batch.extract(i), fed(x[r], starts[r] + 10))
        batch.filter([2, 0])
        batch.extend(HadamoeKVCache.merge([fed(x[1], starts[1] + 10)]))
        rows = [2, 0, 1]
        for i in range(10, steps):
            step(i)
        assert batch.nbytes == sum(fed(x[r], starts[r] + steps).nbytes for r in rows)
        batch.prepare(lengths=[1, 1, 0])
        assert not batch.attends  # a padded prompt


def test_room_that_does_not_grow():
    """Under mx.compile's rules: shapes stay, the count is an array."""
    x = projections(200)
    expected = want(x)
    with metal.installed() as log:
        cache = HadamoeStaticKVCache(fed(x, 126), 200)
        for i in range(126, 200):
            del log[:]
            token, proj = prepared(x[:, i : i + 1])
            close(cache.attend(token, proj), expected[:, i])
            assert len(log) == 5
        assert int(cache.offset) == 200


def test_other_calls_between_tokens(tmp_path):
    """Copies, files, trimming and prompts see what attend() stored."""
    x = projections(330)
    expected = want(x)
    file = str(tmp_path / "cache.safetensors")
    with metal.installed():
        cache = fed(x, 188)
        for i in range(188, 194):
            cache.attend(*prepared(x[:, i : i + 1]))
        other = copy.deepcopy(cache)
        theirs.save_prompt_cache(file, [cache])
        loaded = theirs.load_prompt_cache(file)[0]
        assert same(loaded, fed(x, 194))
        close(other.attend(*prepared(x[:, 194:195])), expected[:, 194])
        close(cache.attend(*prepared(x[:, 194:195])), expected[:, 194])
        assert other.trim(10) == 10
        for a, b in zip(other.keys_and_values(), fed(x, 185).keys_and_values(), strict=True):
            np.testing.assert_array_equal(a, b)
        cache.update_and_fetch(*keys_and_values(x[:, 195:328]))
        close(cache.attend(*prepared(x[:, 328:329])), expected[:, 328])
        assert cache.nbytes == fed(x, 329).nbytes


@pytest.mark.parametrize("codec", ["turbo2", "fp8", "kivi4"])
def test_prompts_over_codecs_of_others(codec):
    """Their pages are decoded for a call, by the kernel that has the CPU's bits."""
    x = projections(200)
    with metal.installed():
        cache = HadamoeKVCache(KVFormat(codec, codec))
        cache.update_and_fetch(*keys_and_values(x[:, :199]))
        keys, values = cache.update_and_fetch(*keys_and_values(x[:, 199:]))
    plain = keys_and_values(x)
    for got, rows, side in zip((keys, values), plain, ("key", "value"), strict=True):
        page = np.array(rows)[0, :, 64:128]
        decoded = kv_ops.kv_decode(kv_ops.kv_encode(page, codec, side=side), codec, D, side=side)
        np.testing.assert_array_equal(np.array(got)[0, :, 64:128], decoded)
