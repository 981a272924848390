"""Any life a cache may lead, against a cache that was simply fed what is left."""

from __future__ import annotations

import copy
import gc

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hadamoe.errors import ContractError
from hadamoe.kv_cache import KVCache

D = 64
TOKENS = np.random.default_rng(0).standard_normal((2, 1, 1024, 1, D), np.float32)


def new(window=None):
    return KVCache(1, 1, D, "hk4v2", window=window)


def feed(cache, ids):
    k, v = (np.ascontiguousarray(a[:, ids]) for a in TOKENS)
    cache.reserve(len(ids))
    cache.append(0, k, v)
    cache.advance()


def answer(cache):
    """What attention makes of all a query could see, and of the next 130 tokens."""
    fork, out = cache.fork(), []
    for n in (1, 129):
        q, k = (np.ascontiguousarray(a[:, -n:]) for a in TOKENS)
        fork.reserve(n)
        out.append(fork.attend(0, q, k, q))
        fork.advance()
    return np.concatenate(out, 1)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("feed"), st.integers(1, 200)),
        st.tuples(st.just("trim"), st.integers(0, 200)),
        st.tuples(st.sampled_from(("fork", "copy", "drop", "switch", "save", "fail")),
                  st.integers(0, 200)),
    ),
    min_size=1, max_size=12,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, window=st.sampled_from((None, None, 1, 3)))
def test_any_life(steps, window, tmp_path_factory):
    lives = [[new(window), [], 0]]  # a cache, the tokens it holds, the most it ever held
    for step, n in steps:
        cache, ids, most = life = lives[0]
        if step == "feed":
            more = [(7 * n + i) % 1024 for i in range(n)]
            feed(cache, np.array(more))
            life[1:] = ids + more, max(most, len(ids + more))
        elif step == "trim" and n <= len(ids):
            try:
                cache.trim(n)
                life[1] = ids[: len(ids) - n]
            except ContractError:
                assert most - (len(ids) - n) > 64  # a page may always be taken back
        elif step in ("fork", "copy"):
            lives.append(
                [cache.fork() if step == "fork" else copy.deepcopy(cache), list(ids), most]
            )
        elif step == "drop" and len(lives) > 1:
            del lives[0]
        elif step == "switch":
            lives = [*lives[1:], lives[0]]
        elif step == "save":
            path = tmp_path_factory.mktemp("life") / "cache"
            cache.save(path)
            lives.append([KVCache.load(path), list(ids), most])
        elif step == "fail" and n < 64:  # a pass that reserves and never comes to an end
            cache.reserve(n)
            life[2] = max(most, len(ids) + n)
        del cache, life
    gc.collect()
    for cache, ids, _ in lives:
        assert cache.lengths.tolist() == [len(ids)]
        plain = new(window)
        if ids:
            feed(plain, np.array(ids))
        np.testing.assert_array_equal(answer(cache), answer(plain))
    gc.collect()
    for pool in {id(c.pool): c.pool for c, *_ in lives}.values():
        want = np.zeros_like(pool.refs)
        for c, *_ in lives:
            if c.pool is pool:
                np.add.at(want, np.fromiter(c.places(), int), 1)
        np.testing.assert_array_equal(pool.refs, want)
