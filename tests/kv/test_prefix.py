"""A remembered beginning goes on with the bits of a sequence that began afresh."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from hadamoe.errors import ContractError
from hadamoe.kv import PAGE
from hadamoe.kv_cache import KVCache
from hadamoe.kv_prefix import PrefixCache

LAYERS, HEADS, D = 2, 1, 32
EMBEDDED = np.random.default_rng(0).standard_normal((LAYERS, 3, 256, HEADS, D), np.float32)


class Stream:
    """A sequence with a state beside its cache, as gated delta layers have one."""

    def __init__(self, cache):
        self.cache, self.state, self.outputs = cache, np.zeros(4, np.float32), []

    def feed(self, ids):
        """Tokens with their positions mixed in; the outputs, one array per layer."""
        first = int(self.cache.lengths[0])
        shift = np.sin(np.arange(first, first + len(ids)))[:, None, None]
        x = np.ascontiguousarray(EMBEDDED[:, :, ids]) + np.float32(shift)
        self.cache.reserve(len(ids))
        y = [self.cache.attend(i, *x[i][:, None]) for i in range(LAYERS)]
        self.cache.advance()
        for i in ids:
            self.state = self.state * np.float32(0.9) + np.float32(i)
        return np.stack(y)


def new(**options):
    return KVCache(LAYERS, HEADS, D, "hk4v3", **options)


def ids_of(n, seed=1):
    return np.random.default_rng(seed).integers(0, 256, n)


def run(prefix, ids, marks=()):
    """(stream, outputs of the tokens fed, tokens found); remembered at marks and at the end."""
    hit = prefix.find(ids)
    stream = Stream(hit.cache if hit else prefix.origin.empty())
    begin = hit.length if hit else 0
    stream.state = hit.states[0].copy() if hit else stream.state
    out = []
    for part in np.split(ids[begin:], [m - begin for m in sorted(marks) if m > begin]):
        out.append(stream.feed(part))
        prefix.put(stream.cache, ids[: stream.cache.lengths[0]], [stream.state])
    return stream, np.concatenate(out, 2), begin


def cold(ids):
    stream = Stream(new())
    return stream, stream.feed(ids)


def check_same(stream, y, ids):
    want, all_of = cold(ids)
    np.testing.assert_array_equal(y, all_of[:, :, len(ids) - y.shape[2] :])
    np.testing.assert_array_equal(stream.state, want.state)
    for i in range(LAYERS):
        for mine, theirs in (("keys", "keys"), ("values", "values")):
            a = getattr(stream.cache.pool, mine)[i][stream.cache.table[0, 1 : len(ids) // PAGE]]
            b = getattr(want.cache.pool, theirs)[i][want.cache.table[0, 1 : len(ids) // PAGE]]
            np.testing.assert_array_equal(a, b)
    more = ids_of(70, 5)
    np.testing.assert_array_equal(stream.feed(more), want.feed(more))


@pytest.mark.parametrize("n", [1, 63, 64, 65, 127, 128, 129, 300])
def test_a_hit_has_the_bits_of_a_cold_run(n):
    prefix = PrefixCache(1 << 30, new())
    ids = ids_of(n + 40)
    assert run(prefix, ids[:n])[2] == 0
    stream, y, found = run(prefix, ids)
    assert found == n
    check_same(stream, y, ids)


def test_the_longest_beginning_is_found():
    prefix = PrefixCache(1 << 30, new())
    ids = ids_of(400)
    run(prefix, ids[:300], marks=[100, 130, 256])
    for n, want in (
        (400, 300),
        (300, 256),
        (301, 300),
        (256, 130),
        (131, 130),
        (130, 100),
        (50, 0),
    ):
        hit = prefix.find(ids[:n])
        assert (hit.length if hit else 0) == want
    other = ids.copy()
    other[140] += 1
    other %= 256
    stream, y, found = run(prefix, other)
    assert found == 130
    check_same(stream, y, other)


def test_equal_pages_are_one_in_memory():
    prefix = PrefixCache(1 << 30, new())
    ids = ids_of(300)
    first, _ = cold(ids)
    del first
    a = Stream(prefix.origin.empty())
    b = Stream(prefix.origin.empty())
    for stream in (a, b):  # side by side, neither knows of the other
        stream.feed(ids)
    assert not set(a.cache.places()) & set(b.cache.places())
    prefix.put(a.cache, ids, [a.state])
    b.feed(ids[:1])
    prefix.put(b.cache, np.append(ids, ids[0]), [b.state])
    assert list(a.cache.places()) == list(b.cache.places())
    assert (prefix.origin.pool.refs[list(a.cache.places())] == 4).all()
    assert len(prefix) == 2
    check_same(b, np.zeros((LAYERS, 1, 0, HEADS, D)), np.append(ids, ids[0]))


def test_the_budget_holds_and_the_oldest_go_first():
    one = PrefixCache(1 << 30, new())
    run(one, ids_of(300))
    prefix = PrefixCache(3 * one.nbytes, new())
    prompts = [ids_of(300, seed) for seed in range(10, 15)]
    for ids in prompts[:3]:
        run(prefix, ids)
    assert prefix.find(np.append(prompts[0], 1))  # used: the next to go is prompts[1]
    for ids in prompts[3:]:
        run(prefix, ids)
        assert prefix.nbytes <= prefix.budget_bytes
    found = [prefix.find(np.append(ids, 1)) is not None for ids in prompts]
    assert found == [True, False, False, True, True]
    assert len(prefix) == 3
    gc.collect()
    assert prefix.origin.pool.refs.sum() == 3 * 3  # 3 snapshots of 3 coded pages
    prefix.clear()
    assert (prefix.nbytes, len(prefix), prefix.origin.pool.refs.sum()) == (0, 0, 0)


def test_a_budget_too_small_for_anything_remembers_nothing():
    prefix = PrefixCache(100, new())
    stream, y, _ = run(prefix, ids_of(200))
    assert len(prefix) == prefix.nbytes == 0
    check_same(stream, y, ids_of(200))


def test_places_of_what_was_forgotten_serve_others():
    """A page's key must not outlive its page."""
    prefix = PrefixCache(1 << 30, new())
    ids = ids_of(300)
    run(prefix, ids)
    prefix.clear()
    gc.collect()
    other = Stream(prefix.origin.empty())
    other.feed(ids_of(300, 7))  # takes the same places
    stream, y, found = run(prefix, ids)
    assert found == 0
    check_same(stream, y, ids)
    check_same(other, np.zeros((LAYERS, 1, 0, HEADS, D)), ids_of(300, 7))


def test_what_a_page_means_is_part_of_its_key():
    ids = ids_of(200)
    ones = np.ones((LAYERS, 4, HEADS, D), np.float32)
    roots = {
        PrefixCache(1, c, m)._root
        for c, m in (
            (new(), ""), (new(), "other"), (KVCache(LAYERS, HEADS, D, "hk4v4"), ""),
            (new(vectors=ones), ""), (new(scales=ones[:, :2, 0, 0]), ""), (new(window=4), ""),
            (new(dtype="float16"), ""),
        )
    }  # fmt: skip
    assert len(roots) == 7
    prefix = PrefixCache(1 << 30, new())
    run(prefix, ids)
    assert prefix.find(ids[1:]) is None


def test_a_window_leaves_pages_out():
    prefix = PrefixCache(1 << 30, new(window=2))
    ids = ids_of(640)
    parts = range(64, 600, 64)
    stream, _, _ = run(prefix, ids[:600], marks=parts)
    more = stream.feed(ids[600:])
    again, y, found = run(prefix, ids)
    assert found == 600
    np.testing.assert_array_equal(y, more)
    assert sum(1 for _ in again.cache.places()) <= 5


def test_what_is_refused():
    prefix = PrefixCache(1 << 30, new())
    other = Stream(new())
    other.feed(ids_of(3))
    with pytest.raises(ContractError, match="of another pool"):
        prefix.put(other.cache, ids_of(3), [])
    mine = Stream(prefix.origin.empty())
    mine.feed(ids_of(3))
    with pytest.raises(ContractError, match="4 ids for 3 tokens in the cache"):
        prefix.put(mine.cache, ids_of(4), [])
    with pytest.raises(ContractError, match=r"ids is float64 \(3,\), needs integers"):
        prefix.find(np.zeros(3))
    with pytest.raises(ContractError, match="needs a pool that grows"):
        PrefixCache(1 << 30, new(tokens=256))
