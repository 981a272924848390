"""The quantized KV cache on MLX's CUDA device, simulated: pages, and attention of a token."""

from __future__ import annotations

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
from simt import cuda  # noqa: E402

from hadamoe import kv_ops, mlx_gpu_kv, mlx_kv  # noqa: E402
from hadamoe.kv import PAGE, KVFormat, page_bytes  # noqa: E402

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (pip install 'hadamoe[mlx]')")
from hadamoe.mlx_cache import HadamoeKVCache  # noqa: E402
from hadamoe.mlx_static import HadamoeStaticKVCache  # noqa: E402

pytestmark = [
    pytest.mark.simulator,  # --device is torch's GPU, not MLX's
    pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing())),
]
D = 64


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("codec", ["h4", "h8", "fp8", "turbo3", "affine8"])
def test_pages_have_the_cpus_bytes(rng, codec, side):
    rows = mx.array(rng.standard_normal((2, 3, PAGE, D)).astype("f4"))
    want = mlx_kv.kv_encode(rows, codec, side=side)
    back = mlx_kv.kv_decode(want, codec, D, side=side)
    mx.eval(want, back)
    with cuda.installed(check=True) as log:
        got = mlx_kv.kv_encode(rows, codec, side=side)
        decoded = mlx_kv.kv_decode(got, codec, D, side=side)
        mx.eval(got, decoded)
    assert len(log) == 2
    if codec[0] == "h":  # MLX's transform sums in another order
        assert (got != want).mean() < 1e-3
        assert mx.abs(decoded - back).mean() < 1e-4
    else:
        assert mx.array_equal(got, want)
        np.testing.assert_allclose(decoded, back, atol=2e-6)


FORM = KVFormat("h4", "turbo3")
H, G = 4, 2


def projections(count: int, seed: int) -> np.ndarray:
    """f32 ``[1, tokens, heads, d]``: query and gate of each head, keys, values."""
    x = np.random.default_rng(seed).standard_normal((1, count, 2 * H + 2 * G, D))
    return x.astype(np.float32)


def want(x: np.ndarray) -> np.ndarray:
    """Gated attention of all tokens by the CPU's kernels ``[1, t, h, d]``."""
    m = x.shape[1] // PAGE + 1
    raw = [np.zeros((1, G, 3, PAGE, D), np.float32) for _ in FORM]
    pages = [np.zeros((m, G, page_bytes(c, D)), np.uint8) for c in FORM]
    layer = kv_ops.KVLayer(FORM, *raw, *pages, np.arange(m, dtype=np.int32)[None])
    parts = [x[:, :, : 2 * H : 2], x[:, :, 2 * H : 2 * H + G], x[:, :, 2 * H + G :]]
    y = kv_ops.kv_attend(*map(np.ascontiguousarray, parts), layer, [0])
    return y / (1 + np.exp(-x[:, :, 1 : 2 * H : 2].astype(np.float64)))


def fed(x: np.ndarray) -> HadamoeKVCache:
    cache, kv = HadamoeKVCache(FORM), x[:, :, 2 * H :].swapaxes(1, 2)
    cache.update_and_fetch(mx.array(kv[:, :G]), mx.array(kv[:, G:]))
    return cache


def attended(cache, x: np.ndarray) -> np.ndarray:
    """A token a sequence through `attend`: ``[b, h, d]``."""
    proj = mx.array(x.reshape(len(x), 1, -1))
    token = mlx_gpu_kv.prepare(proj, (H, G), D, None, None, 0, form=FORM)
    return np.array(cache.attend(token, proj)).reshape(-1, H, D)


def close(y: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(y - expected).max() <= 3e-5 * np.abs(expected).max()


def test_tokens_after_a_prompt():
    """Over a page's end: the page that is full then is stored."""
    x = projections(200, seed=1)
    expected = want(x)
    with cuda.installed(check=True) as log:
        cache = fed(x[:, :180])
        for i in range(180, 200):
            del log[:]
            close(attended(cache, x[:, i]), expected[:, i])
            assert len(log) == (5 if i == 191 else 3)
        assert cache.offset == 200
        assert cache.sides[0].pages.shape[2] == 2


def test_a_batch_of_lengths():
    """Pages in a pool, of which each sequence has its own; one of them fills a page."""
    starts, steps = [5, 190, 130], 4
    x = [projections(n + steps, seed=n) for n in starts]
    expected = [want(each) for each in x]
    with cuda.installed():
        batch = HadamoeKVCache.merge([fed(a[:, :n]) for a, n in zip(x, starts, strict=True)])
        for i in range(steps):
            token = np.concatenate([a[:, n + i] for a, n in zip(x, starts, strict=True)])
            y = attended(batch, token)
            close(y, np.concatenate([e[:, n + i] for e, n in zip(expected, starts, strict=True)]))


def test_a_cache_of_one_shape():
    x = projections(195, seed=2)
    expected = want(x)
    with cuda.installed():
        cache = HadamoeStaticKVCache(fed(x[:, :190]), 256)
        for i in range(190, 195):
            close(attended(cache, x[:, i]), expected[:, i])
