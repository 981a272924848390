"""Tokens to a cache on CUDA: whatever way they come, the CPU's bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_cases import to_torch
from kv_cases_cuda import Cache, codecs_of
from simt import cuda

from hadamoe import cuda_kv, kv_ops
from hadamoe.errors import UnsupportedError
from hadamoe.kv import PAGE, KVFormat, page_bytes

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))

H, G, D = 2, 2, 64


def projections(count: int, batch: int = 1, d: int = D) -> np.ndarray:
    """f32 ``[b, tokens, heads, d]``: query and gate of each head, keys, values."""
    x = np.random.default_rng(0).standard_normal((batch, count, 2 * H + 2 * G, d))
    return x.astype(np.float32)


def keys_and_values(x: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """``[2, b, g, t, d]``."""
    kv = to_torch(x[:, :, 2 * H :].reshape(*x.shape[:2], 2, G, -1).transpose(2, 0, 3, 1, 4))
    return kv.contiguous().to(dtype)


def empty(
    form: KVFormat, batch: int, most: int, dtype: torch.dtype, pool: bool = False, d: int = D
) -> Cache:
    """A cache of which nobody wrote a byte."""
    m = -(-most // PAGE)
    raw = torch.full((2, batch, G, cuda_kv.RAW, d), float("nan")).to(dtype)
    shape, table = (batch, G, m), None
    if pool:
        shape = batch * m + 2, G
        table = np.random.default_rng(0).permutation(shape[0])[: batch * m].astype(np.int32)
        table = table.reshape(batch, m)
    pages = [torch.full((*shape, page_bytes(codec, d)), 255, dtype=torch.uint8) for codec in form]
    return Cache(form, (H, G), raw, pages, table)


def held(cache: Cache, lengths: list[int]) -> list[np.ndarray]:
    """The bytes that stand for tokens."""
    found = []
    for b, n in enumerate(lengths):
        newest = max(n - 1, 0) // PAGE
        for p in sorted({0, max(newest - 1, 0), newest}) if n else ():
            at = (1 + p % 2 if p else 0) * PAGE
            found.append(cache.raw[:, b, :, at : at + min(n - p * PAGE, PAGE)].float().numpy())
        for p in range(1, n // PAGE):
            for pages in cache.pages:
                row = pages[b, :, p] if cache.table is None else pages[cache.table[b, p]]
                found.append(row.numpy())
    return found


def same(a: Cache, b: Cache, lengths: list[int]) -> None:
    for x, y in zip(held(a, lengths), held(b, lengths), strict=True):
        np.testing.assert_array_equal(x, y)


def on_the_cpu(form: KVFormat, x: np.ndarray, counts: list[int], dtype: torch.dtype) -> Cache:
    """The cache that the CPU makes of the last `counts` tokens of each sequence."""
    b, t, _, d = x.shape
    cache = empty(form, b, t, torch.float32, d=d)
    m = cache.m
    rows = x[:, :, 2 * H :]
    rows = torch.from_numpy(rows.copy()).to(dtype).float().numpy()
    raw = [np.zeros((b, G, 3, PAGE, d), np.float32) for _ in form]
    pages = [np.zeros((b * m, G, page_bytes(c, d)), np.uint8) for c in form]
    table = np.arange(b * m, dtype=np.int32).reshape(b, m)
    layer = kv_ops.KVLayer(form, *raw, *pages, table)
    k, v = (np.ascontiguousarray(a) for a in (rows[:, :, :G], rows[:, :, G:]))
    kv_ops.kv_attend(None, k, v, layer, [0] * b, counts)
    cache.raw = to_torch(np.stack(raw)).reshape(2, b, G, -1, d)
    cache.pages = [to_torch(a.reshape(b, m, G, -1).swapaxes(1, 2)) for a in pages]
    return cache


@pytest.mark.parametrize(("codec", "d"), [(codec, d) for d in (32, D) for codec in codecs_of(d)])
def test_a_prompt(codec, d):
    """Every codec; races, bounds and what nobody wrote are looked for."""
    form, x = KVFormat(codec, codec), projections(200, d=d)
    cache = empty(form, 1, 200, torch.float32, d=d)
    with cuda.installed(check=True):
        cache.append(keys_and_values(x, torch.float32), [0])
    same(cache, on_the_cpu(form, x, [200], torch.float32), [200])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "cuts", [[1], [63], [64], [65, 130, 193], [100, 101, 290], [190, 200, 256], [10, 20, 257]]
)
def test_a_prompt_in_pieces(cuts, dtype):
    """Cut anywhere: pages that began in one piece and end in another."""
    form, x = KVFormat("h4", "kivi2"), projections(330)
    cache = empty(form, 1, 330, dtype)
    with cuda.installed(check=True, schedule="random"):
        for begin, end in zip([0, *cuts], [*cuts, 330], strict=True):
            cache.append(keys_and_values(x[:, begin:end], dtype), [begin])
    same(cache, on_the_cpu(form, x, [330], dtype), [330])


@pytest.mark.parametrize("pool", [False, True])
def test_padding_in_front(pool):
    """Sequences of a batch with other counts, one with none."""
    form, x, counts = KVFormat("h3", "h8"), projections(200, 4), [200, 0, 63, 129]
    cache = empty(form, 4, 200, torch.float32, pool)
    with cuda.installed(check=True):
        cache.append(keys_and_values(x, torch.float32), [0] * 4, counts)
    same(cache, on_the_cpu(form, x, counts, torch.float32), counts)


@pytest.mark.parametrize(
    ("form", "d"),
    [("h4/h3", D), ("turbo3/fp8", D), ("bf16/bf16", D), ("h8/h2", 32), ("kivi4/bf16", 32)],
)
def test_tokens_one_by_one(form, d):
    """Each is attended as the CPU does, over pages' ends, and leaves what a prompt leaves."""
    form, begin, count = KVFormat(*form.split("/")), 120, 262
    x = projections(count, 2, d)
    cache = empty(form, 2, count, torch.float32, d=d)
    parts = [x[:, :, : 2 * H : 2], x[:, :, 2 * H : 2 * H + G], x[:, :, 2 * H + G :]]
    layer = kv_ops.KVLayer(
        form,
        *(np.zeros((2, G, 3, PAGE, d), np.float32) for _ in form),
        *(np.zeros((10, G, page_bytes(c, d)), np.uint8) for c in form),
        np.arange(10, dtype=np.int32).reshape(2, 5),
    )
    want = kv_ops.kv_attend(*map(np.ascontiguousarray, parts), layer, [0, 0])
    with cuda.installed():
        cache.append(keys_and_values(x[:, :begin], torch.float32), [0, 0])
        for i in range(begin, count):
            y = cache.attend(to_torch(x[:, i : i + 1].reshape(2, 1, -1)), [i, i]).numpy()
            got = y.reshape(2, H, d)
            assert np.abs(got - want[:, i]).max() <= 3e-5 * np.abs(want[:, i]).max()
    same(cache, on_the_cpu(form, x, [count] * 2, torch.float32), [count] * 2)


def test_plans_stay_within_limits():
    """At most 256 threads and 48 KB; the grid of 131,072 tokens is that of 32,768."""
    for d in cuda_kv.HEAD_DIMS:
        heads = cuda_kv.Heads(64, 16, 2, d, KVFormat("h8", "kivi4"))
        launches = (
            cuda_kv.encode(7, "kivi4", "key", d),
            cuda_kv.decode((64, 2, 2048), "h8", "value", d),
            cuda_kv.append(heads, 4096, 2048, 0, "bfloat16", counts=True, table=True),
            cuda_kv.prepare(heads, 1, 64, "bfloat16", eps=1e-6),
            cuda_kv.runs(heads, 2048, 0, "bfloat16"),
            cuda_kv.join(heads, cuda_kv.slots(2048), 10, "float32"),
            cuda_kv.scores(9, 3, "h2", d),
        )
        for launch in launches:
            assert launch.threads <= 256
            assert launch.shared <= 48 * 1024
            assert max(launch.groups[1:]) < 65536
    assert cuda_kv.slots(2048) == cuda_kv.slots(512) == 130
    assert cuda_kv.slots(1) == 3


def test_heads_that_are_not_compiled():
    heads = cuda_kv.Heads(1, 2, 1, 512, KVFormat("h8", "h8"))
    with pytest.raises(UnsupportedError, match="head_dim is 512, on CUDA 32, 64, 128, 256"):
        cuda_kv.runs(heads, 4, 0, "float32")
