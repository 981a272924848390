"""A small cache of two layers, and what can be seen of it from outside."""

from __future__ import annotations

import numpy as np

from hadamoe.kv import PAGE
from hadamoe.kv_cache import KVCache

LAYERS, HEADS, D = 2, 2, 64
LENGTHS = (1, 63, 64, 65, 127, 128, 129, 300)


def tokens(count, batch=1, seed=0):
    """Queries, keys and values f32 [layers, 3, batch, count, heads, d]."""
    random = np.random.default_rng(seed)
    return random.standard_normal((LAYERS, 3, batch, count, HEADS, D), np.float32)


def new(kv="hk4v3", **options):
    return KVCache(LAYERS, HEADS, D, kv, **options)


def feed(cache, x, sizes=None):
    """Outputs [layers, batch, count, heads, d], fed in pieces."""
    out = []
    for piece in np.split(x, np.cumsum(sizes or [])[:-1], 3) if sizes else [x]:
        piece = np.ascontiguousarray(piece)
        cache.reserve(piece.shape[3])
        out.append(np.stack([cache.attend(i, *piece[i]) for i in range(LAYERS)]))
        cache.advance()
    return np.concatenate(out, 2)


def contents(cache, s=0):
    """All that a later query of sequence s could see."""
    n, found = int(cache.lengths[s]), [int(cache.lengths[s])]
    open_page = n // PAGE
    for i in range(LAYERS):
        for raw in (cache.raw_keys[i][s], cache.raw_values[i][s]):
            found.append(raw[:, 0, : min(n, PAGE)].tobytes())
            if open_page:
                found.append(raw[:, 1 + open_page % 2, : n % PAGE].tobytes())
        for pages in (cache.pool.keys[i], cache.pool.values[i]):
            for p in range(max(1, int(cache.kept_from[s])), open_page):
                found.append(pages[cache.table[s, p]].tobytes())
    return found


def check_counts(*caches):
    """Every place has as many holders as tables name it, and the rest are free."""
    pool = caches[0].pool
    want = np.zeros_like(pool.refs)
    for cache in caches:
        for place in cache.places():
            want[place] += 1
    np.testing.assert_array_equal(pool.refs, want)
    assert sorted(pool._free) == np.flatnonzero(want == 0).tolist()


def plain(x, **options):
    cache = new(**options)
    return cache, feed(cache, x)


def feed_cache(*parts):
    cache = new()
    for part in parts:
        feed(cache, part)
    return cache
