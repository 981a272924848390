"""Attention of one token over coded pages on CUDA: within its bound, and the same from any room."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attend_claims import (  # noqa: F401
    OTHERS,
    OURS,
    Token,
    test_every_pair_of_ours,
    test_gate,
    test_mutants_leave_the_bound,
)
from cuda_cases import to_torch
from kv_cases_cuda import Cache
from simt import cuda

from hadamoe import cuda_kv
from hadamoe.kv import CODECS, PRESETS, KVFormat, page_bytes
from hadamoe.verify.kv_cases import Shape

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))

MIXED = [("bf16", "h4"), ("h8", "fp8"), ("turbo3", "kivi2"), ("kivi4", "turbo4"), ("affine8", "h2")]


class Case(Token):
    """`attend_claims.Token` through launches."""

    def cache(self, room: int = 0, pool: bool = False) -> Cache:
        """The layer before the token; with ``room``, that many pages of 0xFF behind."""
        layer, pages = self.layer, []
        b, g, _, _, d = layer.raw_keys.shape
        rows = [to_torch(a.copy()) for a in (layer.raw_keys, layer.raw_values)]
        if rows[0].dtype == torch.uint16:
            rows = [a.view(torch.bfloat16) for a in rows]
        for a in (layer.key_pages, layer.value_pages):
            if not pool:
                a = a[np.maximum(layer.table, 0)].swapaxes(1, 2)
                a = np.pad(a, [(0, 0), (0, 0), (0, room), (0, 0)], constant_values=255)
            pages.append(to_torch(a.copy()))
        fp8 = () if layer.scales is None else (tuple(map(float, layer.scales)),)
        heads = self.q.shape[2], g
        raw = torch.stack(rows).reshape(2, b, g, -1, d)
        return Cache(self.form, heads, raw, pages, layer.table if pool else None, *fp8)

    def run(self, room: int = 0, gated: bool = False, pool: bool = False, **options):
        """(y ``[b, 1, h, d]``, the launches, the cache)."""
        cache = self.cache(room, pool)
        with cuda.installed(**options) as log:
            y = cache.attend(to_torch(self.proj), list(self.shape.past), gated)
        return y.numpy().reshape(self.q.shape), log, cache

    def check(self, **options) -> None:
        y, log, _ = self.run(**options)
        assert np.isfinite(y).all()
        assert (np.abs(y - self.want.value) <= self.want.error).all()
        assert len(log) == 3  # prepare, runs, join


@pytest.fixture
def token_case():
    return Case


@pytest.mark.parametrize("codec", OTHERS)
def test_other_codecs(codec):
    Case(KVFormat(codec, codec), Shape(8, 2, 64, (331, 65), 1)).check(check=True)


@pytest.mark.parametrize("form", MIXED, ids="/".join)
def test_mixed(form):
    Case(KVFormat(*form), Shape(4, 1, 128, (400,), 1, raw="bf16")).check()


@pytest.mark.parametrize(
    "past", [0, 1, 62, 63, 64, 126, 127, 128, 190, 191, 255, 256, 319, 320, 575, 576, 1024]
)
def test_every_length(past):
    """Around the ends of pages and of runs of 4 pages; what the token fills is stored."""
    case = Case(KVFormat("h4", "h3"), Shape(8, 2, 64, (past,), 1))
    case.check(check=past < 600)
    _, _, cache = case.run()
    for got, want in zip(cache.pages, (case.after.key_pages, case.after.value_pages), strict=True):
        for p in range(1, (past + 1) // 64):
            place = case.layer.table[0, p]
            np.testing.assert_array_equal(got[0, :, p], want[place])


#: Of heads of 32 columns: each codec of ours on either side, and the others that store them.
NARROW = [("h2", "h8"), ("h3", "h4"), ("h4", "h3"), ("h8", "h2")]
NARROW += [("bf16", "bf16"), ("fp8", "kivi2"), ("kivi4", "fp8"), ("kivi2", "kivi4")]


@pytest.mark.parametrize("form", NARROW, ids="/".join)
def test_heads_of_32_columns(form):
    """A warp is a block; half of what tensor cores multiply keys with is zeros."""
    Case(KVFormat(*form), Shape(8, 2, 32, (331, 65), 1)).check(check=True)


@pytest.mark.parametrize("d", [32, 128, 256])
@pytest.mark.parametrize("heads", [(8, 1), (2, 2), (3, 1), (10, 2), (16, 1)])
def test_every_head(heads, d):
    """Groups of heads that are no eight."""
    Case(OURS[(d // 32 + heads[0]) % 16], Shape(*heads, d, (200,), 1)).check()


@pytest.mark.parametrize("raw", ["f16", "bf16"])
@pytest.mark.parametrize("pool", [False, True])
def test_raw_dtypes_and_ragged_batches(raw, pool):
    case = Case(KVFormat("h8", "h4"), Shape(8, 2, 64, (0, 70, 700, 127, 9), 1, raw=raw))
    case.check(pool=pool)


@pytest.mark.parametrize("preset", ["hk4v3", "turbo4v2"])
def test_the_model(preset):
    """8 query heads to a key head of 256 columns; each byte of the pages is read once."""
    form = PRESETS[preset]
    case = Case(form, Shape(16, 2, 256, (600,), 1, raw="bf16"))
    y, log, _ = case.run(check=True)
    assert (np.abs(y - case.want.value) <= case.want.error).all()
    for name, codec in zip(("key_pages", "value_pages"), form, strict=True):
        pages = 2 * 8 * page_bytes(codec, 256)  # 10 pages less page 0 and the own
        assert log[1].traffic[name].unique_read == pages


@pytest.mark.parametrize("form", cuda_kv.COMPILED, ids="/".join)
def test_kernels_of_presets(form):
    """Those with a kernel of their own have the bits of the one for all codecs."""
    case = Case(form, Shape(8, 1, 256, (383,), 1, raw="bf16"))
    case.check()
    y, log, cache = case.run(check=True)
    assert log[1].name == f"kv_runs<256, {CODECS[form.key]}, {CODECS[form.value]}>"
    compiled, cuda_kv.COMPILED = cuda_kv.COMPILED, []
    try:
        other, log, all_codecs = case.run()
    finally:
        cuda_kv.COMPILED = compiled
    assert log[1].name == "kv_runs<256, 99, 99>"
    np.testing.assert_array_equal(y, other)
    for a, b in zip(cache.pages, all_codecs.pages, strict=True):
        assert torch.equal(a, b)  # the page that the token filled


def test_many_runs_to_a_part():
    """Beyond 512 pages a part has several runs."""
    Case(KVFormat("h2", "h2"), Shape(1, 1, 64, (64 * 517 + 5,), 1)).check()
    Case(KVFormat("turbo2", "fp8"), Shape(1, 1, 64, (64 * 514,), 1)).check()


def test_room_behind_the_pages_is_not_read():
    """Parts beyond the length end at once: the same bits with any room, and its bytes untouched."""
    case = Case(KVFormat("h4", "h3"), Shape(4, 2, 64, (400, 200), 1))
    plain = case.run()[0]
    roomy, log, _ = case.run(room=300, check=True)
    np.testing.assert_array_equal(roomy, plain)
    seen = 2 * (5 + 2)  # pages between page 0 and the own one
    assert log[1].traffic["key_pages"].unique_read == seen * page_bytes("h4", 64)


def test_a_batch_changes_no_bit():
    """A sequence alone and in company, threads in any order."""
    both = Case(KVFormat("h4", "h2"), Shape(8, 2, 64, (300, 300), 1))
    y = both.run()[0]
    np.testing.assert_array_equal(both.run(schedule="random", seed=3)[0], y)
    cache, one = both.cache(), both.cache()
    one.heads = one.heads._replace(batch=1)
    one.raw = cache.raw[:, 1:].contiguous()
    one.pages = [a[1:].contiguous() for a in cache.pages]
    with cuda.installed():
        alone = one.attend(to_torch(both.proj[1:]), [300])
    np.testing.assert_array_equal(alone.numpy().reshape(y[1].shape), y[1])
