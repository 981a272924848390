"""The life of a cache: whatever happens to it, what it holds is what a plain run would hold."""

from __future__ import annotations

import gc
import re
import warnings

import numpy as np
import pytest
from small_cache import (
    HEADS,
    LAYERS,
    LENGTHS,
    D,
    check_counts,
    contents,
    feed,
    feed_cache,
    new,
    plain,
    tokens,
)

from hadamoe.errors import ContractError
from hadamoe.kv import PAGE, PRESETS, page_bytes
from hadamoe.kv_cache import KVCache


@pytest.mark.parametrize("n", LENGTHS)
def test_pieces_leave_what_one_piece_leaves(n):
    x = tokens(n)
    cache, want = plain(x)
    for sizes in ([1] * n if n < 130 else [1, 62, 1, 2, 62, 1, n - 129], [n - n // 2, n // 2]):
        other = new()
        np.testing.assert_array_equal(feed(other, x, [s for s in sizes if s]), want)
        assert contents(other) == contents(cache)


@pytest.mark.parametrize("kv", PRESETS)
def test_bytes_are_those_of_the_format(kv):
    cache = new(kv)
    cache.reserve(300)
    cache.advance()
    codec_bytes = sum(page_bytes(c, D) for c in PRESETS[kv])
    assert cache.coded_bytes == 3 * LAYERS * HEADS * codec_bytes  # pages 1, 2, 3
    assert cache.raw_bytes == LAYERS * 2 * HEADS * 3 * PAGE * D * 2
    assert cache.nbytes == cache.coded_bytes + cache.raw_bytes + cache.table.nbytes
    assert f"{cache.coded_bytes:,} B coded" in cache.describe()


# (bytes of a key and value, of a token of the whole model): 10 layers, 2 heads of 256
TABLE = {
    "bf16": 20480, "fp8": 10240, "affine8": 10880, "affine4": 5760, "turbo4v2": 4000,
    "turbo4": 5280, "turbo3": 4000, "turbo2": 2720, "hk8v8": 10320, "hk8v4": 7760,
    "hk4v4": 5200, "hk4v3": 4560, "hk4v2": 3920, "kivi4": 6400, "kivi2": 3840,
}  # fmt: skip


def test_bytes_per_token_of_this_model():
    assert TABLE.keys() == PRESETS.keys()
    for kv, want in TABLE.items():
        cache = KVCache(10, 2, 256, kv, tokens=256)
        assert cache.token_bytes == want
        assert f"{want} bytes per token" in cache.describe()
        cache.reserve(256)
        cache.advance()
        assert cache.coded_bytes == 3 * PAGE * want


@pytest.mark.parametrize("drop", [1, 5, 44, 45, 64, 108])
@pytest.mark.parametrize("n", [150, 172, 300, 320])
def test_tokens_taken_back_leave_no_trace(n, drop):
    x, wrong = tokens(n), tokens(n, seed=1)
    cache, want = plain(x)
    keep = n - drop
    other = new()
    feed(other, x[:, :, :, :keep])
    feed(other, wrong[:, :, :, keep:])
    if keep % PAGE and 0 < keep // PAGE < (n - 1) // PAGE - 1:
        with pytest.raises(ContractError, match="would leave"):
            other.trim(drop)
        return
    other.trim(drop)
    check_counts(other)
    np.testing.assert_array_equal(feed(other, x[:, :, :, keep:]), want[:, :, keep:])
    assert contents(other) == contents(cache)


def test_trim_reaches_whole_pages_and_the_first_one():
    x = tokens(400)
    for keep in (0, 1, 63, 64, 128, 192):
        cache, want = plain(x)
        cache.trim(400 - keep)
        assert cache.lengths.tolist() == [keep]
        np.testing.assert_array_equal(feed(cache, x[:, :, :, keep:]), want[:, :, keep:])
    cache, _ = plain(x)
    cache.trim(400 - 128)
    before = contents(cache)
    with pytest.raises(
        ContractError,
        match=re.escape(
            "trim would leave 100 of 128 tokens of sequence 0, "
            "needs a multiple of 64, less than 64, or at least 128"
        ),
    ):
        cache.trim(28)
    assert contents(cache) == before
    with pytest.raises(ContractError, match="leave -1 of 128 tokens of sequence 0, needs none"):
        cache.trim(129)
    with pytest.raises(ContractError, match="trim has -1, needs 0 or more"):
        cache.trim(-1)


def test_forks_share_pages_and_go_their_own_ways():
    x, a, b = tokens(200), tokens(150, seed=1), tokens(150, seed=2)
    one, _ = plain(x)
    two = one.fork()
    np.testing.assert_array_equal(one.pool.refs[one.table[0, 1:3]], [2, 2])
    check_counts(one, two)
    want = [feed(plain(x)[0], part) for part in (a, b)]
    for cache, part, y in zip((one, two), (a, b), want, strict=True):
        np.testing.assert_array_equal(feed(cache, part), y)
    check_counts(one, two)
    one.trim(one.lengths)
    check_counts(one, two)
    assert contents(two) == contents(feed_cache(x, b))
    del two, cache
    gc.collect()
    check_counts(one)
    assert not one.pool.refs.any()


def test_a_fork_of_a_pass_under_way_has_only_what_is_there():
    cache, _ = plain(tokens(190))
    cache.reserve(10)
    fork = cache.fork()
    assert list(fork.places()) == cache.table[0, 1:2].tolist()
    check_counts(cache, fork)


def test_rows_are_reordered_repeated_and_selected():
    x = np.concatenate([tokens(130, seed=s) for s in range(3)], 2)
    cache = new(batch=3)
    feed(cache, x)
    for rows in ([2, 0, 1], [1, 1, 0, 0], [2]):
        fork = cache.fork(rows)
        assert fork.batch == len(rows)
        assert [contents(fork, i) for i in range(len(rows))] == [contents(cache, r) for r in rows]
        more = np.concatenate([tokens(70, seed=9 + r) for r in rows], 2)
        y = feed(fork, more)
        for i, r in enumerate(rows):
            alone = feed_cache(x[:, :, r : r + 1])
            np.testing.assert_array_equal(feed(alone, more[:, :, i : i + 1])[:, 0], y[:, i])
        check_counts(cache, fork)
    with pytest.raises(ContractError, match=r"rows has \[3\], needs 0 to 2"):
        cache.fork([3])
    with pytest.raises(ContractError, match="rows is bool"):
        cache.fork(np.array([True, False, True]))


def test_ragged_batches_hold_what_each_sequence_holds_alone():
    counts, width = np.array([3, 200, 64]), 200
    alone = [tokens(n, seed=s) for s, n in enumerate(counts)]
    x = tokens(width, 3, seed=7)  # what is not real is anything
    for s, n in enumerate(counts):
        x[:, :, s, width - n :] = alone[s][:, :, 0]
    cache = new(batch=3)
    cache.reserve(counts)
    ys = [cache.attend(i, *x[i]) for i in range(LAYERS)]
    cache.advance(counts)
    assert cache.lengths.tolist() == counts.tolist()
    for s, n in enumerate(counts):
        one, want = plain(alone[s])
        assert contents(cache, s) == contents(one)
        for i in range(LAYERS):
            np.testing.assert_array_equal(ys[i][s, width - n :], want[i, 0])
    cache.trim([3, 8, 0])
    assert cache.lengths.tolist() == [0, 192, 64]


def test_a_window_forgets_what_it_leaves_behind():
    x = tokens(700)
    full, want = plain(x[:, :, :, : 4 * PAGE])
    cache = new(window=3)
    y = feed(cache, x, [70] * 10)
    np.testing.assert_array_equal(y[:, :, : 4 * PAGE], want)  # pages 1..2 + own: all in sight
    assert sum(1 for _ in cache.places()) <= 3 + 2
    check_counts(cache)
    other = new(window=3)
    np.testing.assert_array_equal(feed(other, x, [1, 699]), y)
    assert contents(other) == contents(cache)
    cache.trim(100)  # a draft of 100 tokens
    np.testing.assert_array_equal(feed(cache, x[:, :, :, 600:]), y[:, :, 600:])
    with pytest.raises(ContractError, match="would leave 320 of 700 tokens of sequence"):
        cache.trim(380)
    cache.trim(600 + 36)  # page 1 sees no coded page
    np.testing.assert_array_equal(feed(cache, x[:, :, :, 64:400]), y[:, :, 64:400])
    cache.trim(64)
    np.testing.assert_array_equal(feed(cache, x[:, :, :, 336:]), y[:, :, 336:])
    assert contents(cache) == contents(other)
    assert sum(1 for _ in cache.places()) <= 3 + 2
    assert full.kept_from[0] == 1


def test_a_window_takes_no_more_places_than_it_was_given():
    x = tokens(192 * 8)
    cache = new(window=3, tokens=192 * 8)
    places = [a.ctypes.data for a in cache.pool.keys]
    y = feed(cache, x, [192] * 8)
    np.testing.assert_array_equal(y, feed(new(window=3), x))
    assert len(cache.pool.refs) == 8
    assert [a.ctypes.data for a in cache.pool.keys] == places


def test_given_tokens_nothing_is_ever_reallocated():
    x = tokens(640)
    cache = new(tokens=640)
    arrays = [cache.table, *cache.layer(0).outputs, *cache.layer(1).outputs]
    np.testing.assert_array_equal(feed(cache, x, [64] * 10), plain(x)[1])
    now = [cache.table, *cache.layer(0).outputs, *cache.layer(1).outputs]
    assert all(a is b for a, b in zip(arrays, now, strict=True))
    with pytest.raises(ContractError, match=r"sequence 0 has 640 \+ 1 tokens, needs at most 640"):
        cache.reserve(1)
    fork = cache.fork()
    fork.trim(64)
    with pytest.raises(ContractError, match="has 9 pages, 0 free, needs 1 more"):
        fork.reserve(64)
    cache.trim(64)
    feed(fork, x[:, :, :, 576:])


def test_pages_grow_by_doubling():
    cache, sizes = new(), set()
    for _ in range(80):
        cache.reserve(64)
        cache.advance()
        sizes.add(len(cache.pool.refs))
    assert sizes == {0, 16, 32, 64, 128}
    check_counts(cache)
    x = tokens(40 * PAGE)
    grown = new()
    np.testing.assert_array_equal(feed(grown, x, [PAGE] * 40), plain(x, tokens=40 * PAGE)[1])
    assert contents(grown) == contents(plain(x)[0])


def test_numbers_that_are_not_finite_are_refused():
    cache, _ = plain(tokens(100))
    before, bad = contents(cache), tokens(300, seed=1)
    bad[1, 1, 0, 17, 0, 3] = np.nan  # among the keys of layer 1
    cache.reserve(2)
    cache.attend(0, *bad[0, :, :, :2])
    with pytest.raises(ContractError, match="finite"):
        cache.attend(1, *np.ascontiguousarray(bad[1, :, :, 16:18]))
    cache.reserve(2)  # a short pass that failed has taken nothing away
    assert contents(cache) == before
    np.testing.assert_array_equal(
        feed(cache, tokens(150, seed=2)), feed(plain(tokens(100))[0], tokens(150, seed=2))
    )


def test_a_long_pass_that_failed_is_said_to_have_lost_the_open_page():
    cache, _ = plain(tokens(100))
    cache.reserve(200)
    message = "failed has overwritten tokens of sequence 0 after 64; trim it there"
    with pytest.raises(ContractError, match=message):
        cache.reserve(1)
    with pytest.raises(ContractError, match=message):
        cache.save("nowhere")
    cache.trim(36)
    x = tokens(100)
    np.testing.assert_array_equal(feed(cache, x[:, :, :, 64:]), plain(x)[1][:, :, 64:])


def test_layers_left_unquantized_are_said():
    with pytest.warns(UserWarning, match="layers left unquantized: 1"):
        cache = new(["hk8v4", "bf16"])
    assert "layer 1: keys unquantized (bf16), 128 B; values unquantized (bf16), 128 B" in (
        cache.describe()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new("bf16")
        assert "layers 0-1: keys h8, 66 B; values h4, 34 B per token" in new("hk8v4").describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch is 0, needs at least 1"),
        ({"tokens": 0}, "tokens is 0, needs at least 1"),
        ({"window": 0}, "window is 0, needs at least 1"),
        ({"dtype": "int8"}, "dtype is 'int8', needs one of bfloat16, float16, float32"),
        ({"kv": "hk9"}, "'hk9' is no preset"),
        ({"kv": ["hk8v8"]}, "has 1 presets, needs one or 2"),
        ({"kv": "hk8v4", "head_dim": 96}, "head_dim is 96, h8 needs"),
    ],
)
def test_what_makes_no_cache(options, message):
    with pytest.raises(ContractError, match=re.escape(message)):
        KVCache(**({"layers": LAYERS, "heads": HEADS, "head_dim": D} | options))


def test_calls_out_of_order():
    cache = new(batch=2)
    with pytest.raises(ContractError, match=r"no tokens are reserved, needs reserve\(counts\)"):
        cache.advance()
    with pytest.raises(ContractError, match=r"reserve has int64 \(3,\), needs a number or \[2\]"):
        cache.reserve([1, 2, 3])
    with pytest.raises(ContractError, match="reserve has float64"):
        cache.reserve(0.5)
    cache.reserve([1, 2])
    with pytest.raises(ContractError, match=r"advance has counts=3, needs \[1 2\]"):
        cache.advance(3)
