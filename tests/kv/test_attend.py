"""kv_attend: within a derived bound of its meaning; one query has one result, however asked for."""

from __future__ import annotations

import numpy as np
import pytest

from hadamoe import ContractError, _cpu, kv_ops, ops, reference_kv
from hadamoe.kv import CODECS, KVFormat
from hadamoe.verify import claims, kv_cases, kv_rounding
from hadamoe.verify.kv_cases import Shape

OURS = [KVFormat(k, v) for k in kv_cases.OURS for v in kv_cases.OURS]
OTHERS = [codec for codec in CODECS if codec not in kv_cases.OURS]


def attend(q, k, v, layer, lengths, counts=None):
    """(y, the layer after it) of the native op on copies, y starting as NaN."""
    after = reference_kv.copied(layer)
    with claims.native(claims.Poisoned(_cpu)):
        return kv_ops.kv_attend(q, k, v, after, lengths, counts), after


def same_cache(a, b, lengths) -> bool:
    pairs = zip(kv_cases.live(a, lengths), kv_cases.live(b, lengths), strict=True)
    return all(x.tobytes() == y.tobytes() for x, y in pairs)


def untouched(a, b) -> bool:
    return all(x.tobytes() == y.tobytes() for x, y in zip(a.outputs, b.outputs, strict=True))


def part(arrays, begin: int, end: int):
    return [None if a is None else np.ascontiguousarray(a[:, begin:end]) for a in arrays]


# ---- against its meaning ----


@pytest.mark.parametrize("fmt", OURS, ids="/".join)
def test_every_pair_of_ours(isa, fmt):
    rng = np.random.default_rng(CODECS[fmt.key] * 16 + CODECS[fmt.value])
    claims.check(kv_cases.attend_case(rng, fmt, Shape(8, 2, 64, (331, 65), 3, vectors=True)))


@pytest.mark.parametrize("codec", OTHERS)
def test_every_other_codec(isa, codec):
    rng = np.random.default_rng(CODECS[codec])
    for dtype, raw in (("f32", "bf16"), ("f16", "f16")):
        shape = Shape(4, 2, 64, (193,), 2, dtype=dtype, raw=raw)
        claims.check(kv_cases.attend_case(rng, KVFormat(codec, codec), shape))
        claims.check(kv_cases.attend_case(rng, KVFormat(codec, "h4"), shape))
        claims.check(kv_cases.attend_case(rng, KVFormat("h3", codec), shape))


LENGTHS = [
    (total, t)
    for total in (1, 63, 64, 65, 127, 128, 129, 300, 1025)
    for t in (1, 2, 4, 8, 64, 65, 200)
    if t <= total
]


@pytest.mark.parametrize(("total", "t"), LENGTHS)
def test_every_length(isa, total, t):
    """t queries that end at token `total`; 8 heads to a key head."""
    rng = np.random.default_rng(total * 256 + t)
    fmt = OURS[(total + t) % 16]
    claims.check(kv_cases.attend_case(rng, fmt, Shape(16, 2, 32, (total - t,), t)))


@pytest.mark.parametrize("d", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("heads", [(8, 1), (2, 2), (3, 1), (10, 2), (16, 2)])
def test_every_head(isa, heads, d):
    rng = np.random.default_rng(d + heads[0])
    fmt = OURS[(d // 32 + heads[0]) % 16]
    for t in (1, 5):
        claims.check(kv_cases.attend_case(rng, fmt, Shape(*heads, d, (200,), t)))


@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_window(isa, window):
    rng = np.random.default_rng(window)
    for past, t in ((640, 1), (190, 200), (65, 2)):
        shape = Shape(4, 2, 64, (past,), t, window=window)
        claims.check(kv_cases.attend_case(rng, KVFormat("h4", "h3"), shape))


def test_a_window_needs_no_pages_behind_it(isa):
    """Places outside the window are -1; nobody looks at them."""
    rng = np.random.default_rng(0)
    shape = Shape(4, 2, 64, (640,), 1, window=2)
    layer = kv_cases.filled(rng, KVFormat("h4", "h3"), shape, 1)
    q, k, v = kv_cases.tokens(rng, shape, 1)
    want = attend(q, k, v, layer, [640])[0]
    layer.table[:, :8] = -1  # token 640 is in page 10
    assert np.array_equal(attend(q, k, v, layer, [640])[0], want)
    layer.table[:, 8] = -1
    with pytest.raises(ops.ContractError, match="table has -1 for page 8 of sequence 0"):
        attend(q, k, v, layer, [640])


@pytest.mark.parametrize("raw", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_ragged_batches(isa, dtype, raw):
    rng = np.random.default_rng(5)
    shape = Shape(8, 2, 64, (0, 70, 700, 127, 9), 66, (66, 1, 30, 2, 0), dtype=dtype, raw=raw)
    claims.check(kv_cases.attend_case(rng, KVFormat("h4", "h2"), shape))


# ---- mutants of its meaning leave the bound ----


@pytest.fixture
def small():
    """(meaning with its bound, y of the native op) of a query over two pages of codes."""
    rng = np.random.default_rng(11)
    shape = Shape(4, 2, 64, (200,), 3, vectors=True)
    layer = kv_cases.filled(rng, KVFormat("h4", "h2"), shape, 3)
    q, k, v = kv_cases.tokens(rng, shape, 3)
    arguments = (q, k, v, layer, (200,))
    return arguments, kv_rounding.kv_attend(*arguments)[0]


def inside(y, bounded) -> bool:
    return bool((np.abs(y - bounded.value) <= bounded.error).all())


def test_the_meaning_is_what_the_bound_is_about(small):
    """Weights in 14 bits move a result by a part in thousands at most."""
    arguments, bounded = small
    assert np.abs(bounded.value - reference_kv.kv_attend(*arguments)[0]).max() < 1e-3
    assert inside(attend(*arguments)[0], bounded)


@pytest.mark.parametrize("name", ["key_pages", "value_pages", "raw_keys", "raw_values"])
def test_other_pages_leave_the_bound(small, name):
    """Tokens a place further on."""
    (q, k, v, layer, lengths), bounded = small
    wrong = getattr(layer, name)
    wrong = np.roll(wrong, 1, 0 if name.endswith("pages") else 3)
    y = attend(q, k, v, layer._replace(**{name: np.ascontiguousarray(wrong)}), lengths)[0]
    assert not inside(y, bounded)


@pytest.mark.parametrize("vector", range(4))
def test_other_vectors_leave_the_bound(small, vector):
    (q, k, v, layer, lengths), bounded = small
    wrong = layer.vectors.copy()
    wrong[vector] = np.roll(wrong[vector], 1, -1)
    assert not inside(attend(q, k, v, layer._replace(vectors=wrong), lengths)[0], bounded)


def test_results_without_wieners_factor_leave_the_bound(small, monkeypatch):
    arguments, bounded = small
    monkeypatch.setattr(reference_kv, "correction", lambda bits, coded, *_: np.ones(len(coded)))
    assert not inside(reference_kv.kv_attend(*arguments)[0], bounded)


def test_a_page_too_few_leaves_the_bound(small):
    (q, k, v, layer, lengths), bounded = small
    assert not inside(attend(q, k, v, layer._replace(window=1), lengths)[0], bounded)


def test_a_token_too_few_leaves_the_bound(small):
    (q, k, v, layer, _), bounded = small
    assert not inside(attend(q, k, v, layer, [199])[0], bounded)
    assert not inside(attend(q, k, v, layer, [201])[0], bounded)


# ---- the same bits however it is asked for ----


@pytest.mark.parametrize("fmt", ["h4/h3", "h8/h2", "turbo4/affine4", "kivi2/fp8", "bf16/bf16"])
@pytest.mark.parametrize("split", [[1] * 330, [7, 128, 100, 65, 30], [329, 1], [64] * 5 + [10]])
def test_a_prompt_cut_anywhere_gives_the_same_bits(isa, split, fmt):
    rng = np.random.default_rng(7)
    shape = Shape(8, 2, 64, (0, 0), 330, raw="bf16")
    layer = kv_cases.layer_of(rng, KVFormat(*fmt.split("/")), shape, 330)
    tokens = kv_cases.tokens(rng, shape, 330)
    y, whole = attend(*tokens, layer, [0, 0])
    past, rows = 0, []
    for t in split:
        out, layer = attend(*part(tokens, past, past + t), layer, [past] * 2)
        rows.append(out)
        past += t
    assert np.array_equal(np.concatenate(rows, 1), y)
    assert same_cache(whole, layer, [330] * 2)


def test_prompts_longer_than_one_chunk(isa):
    """1100 tokens in one call and in three."""
    rng = np.random.default_rng(8)
    shape = Shape(2, 1, 32, (0,), 1100)
    layer = kv_cases.layer_of(rng, KVFormat("h4", "h3"), shape, 1100)
    tokens = kv_cases.tokens(rng, shape, 1100)
    y, whole = attend(*tokens, layer, [0])
    _, first = attend(*part(tokens, 0, 700), layer, [0])
    _, second = attend(*part(tokens, 700, 701), first, [700])
    last, third = attend(*part(tokens, 701, 1100), second, [701])
    assert np.array_equal(last, y[:, 701:])
    assert same_cache(whole, third, [1100])


def test_appended_first_then_asked(isa):
    """Without queries tokens are kept; without keys the last ones are asked about."""
    rng = np.random.default_rng(9)
    shape = Shape(4, 2, 64, (200, 3), 60)
    layer = kv_cases.filled(rng, KVFormat("h4", "h3"), shape, 60)
    q, k, v = kv_cases.tokens(rng, shape, 60)
    counts = [60, 11]
    y, after = attend(q, k, v, layer, shape.past, counts)
    nothing, kept = attend(None, k, v, layer, shape.past, counts)
    assert nothing is None
    assert same_cache(after, kept, [260, 14])
    again, still = attend(q, None, None, kept, [260, 14], counts)
    assert np.array_equal(again, y)
    assert untouched(still, kept)


def test_a_sequence_does_not_depend_on_its_batch(isa):
    rng = np.random.default_rng(10)
    shape = Shape(8, 2, 64, (0, 130, 700), 66, (66, 1, 30))
    layer = kv_cases.filled(rng, KVFormat("h4", "h2"), shape, 66)
    q, k, v = kv_cases.tokens(rng, shape, 66)
    y, _ = attend(q, k, v, layer, shape.past, shape.counts)
    for i, n in enumerate(shape.counts):
        one = layer._replace(
            raw_keys=layer.raw_keys[i : i + 1],
            raw_values=layer.raw_values[i : i + 1],
            table=layer.table[i : i + 1],
        )
        alone = [np.ascontiguousarray(a[i : i + 1, 66 - n :]) for a in (q, k, v)]
        out, _ = attend(*alone, one, shape.past[i : i + 1])
        assert np.array_equal(out[0], y[i, 66 - n :])
        assert not y[i, : 66 - n].any()


def test_padding_is_never_looked_at(isa):
    rng = np.random.default_rng(12)
    shape = Shape(4, 2, 64, (130,), 9, (5,))
    layer = kv_cases.filled(rng, KVFormat("h4", "h3"), shape, 9)
    tokens = kv_cases.tokens(rng, shape, 9)
    y, after = attend(*tokens, layer, (130,), (5,))
    for a in tokens:
        a[:, :4] = np.nan
    again, same = attend(*tokens, layer, (130,), (5,))
    assert np.array_equal(again, y)
    assert same_cache(after, same, [135])


def test_same_bits_for_any_number_of_threads(isa):
    rng = np.random.default_rng(13)
    for shape in (
        Shape(16, 2, 64, (4100,), 1),
        Shape(8, 1, 64, (1030, 5), 2),
        Shape(4, 2, 32, (60,), 200),
    ):
        claims.check_deterministic(kv_cases.attend_case(rng, KVFormat("h4", "h3"), shape))


def test_shifted_keys_and_values_are_the_same_attention(isa):
    """With the shift as their mean, codes are those of the unshifted; softmax sees no shift of all
    scores; values come back with it."""
    rng = np.random.default_rng(14)
    shape = Shape(4, 2, 64, (300,), 4)
    plain = kv_cases.layer_of(rng, KVFormat("h4", "h3"), shape, 304)
    means = rng.integers(-8, 9, (2, 2, 64)).astype(np.float32) / 4
    vectors = np.stack([means[0], np.ones_like(means[0]), means[1], np.ones_like(means[0])])
    shifted = plain._replace(vectors=vectors)
    q, k, v = kv_cases.tokens(rng, shape, 304)
    k, v = (np.rint(a * 64) / 64 for a in (k, v))  # so that adding a mean is exact
    y, after = attend(q, k, v, plain, [0])
    moved, centred = attend(q, k + means[0], v + means[1], shifted, [0])
    assert np.array_equal(after.key_pages, centred.key_pages)
    assert np.array_equal(after.value_pages, centred.value_pages)
    error = np.abs(moved - (y + means[1].repeat(2, 0)))
    assert error.mean() < 1e-6
    assert error.max() < 1e-4  # scores reach 20, a weight may round to the next of its 14 bits


# ---- edges ----


@pytest.mark.parametrize("fmt", ["h4/h3", "h8/h2", "h2/h8"])
def test_zero_and_huge_rows_stay_finite(isa, fmt):
    rng = np.random.default_rng(15)
    shape = Shape(4, 2, 64, (0,), 330)
    layer = kv_cases.layer_of(rng, KVFormat(*fmt.split("/")), shape, 330)
    q, k, v = kv_cases.tokens(rng, shape, 330)
    zero = attend(q, 0 * k, 0 * v, layer, [0])[0]
    assert not zero.any()
    for size in (1e4, 1e-6):
        y = attend(q, k * np.float32(size), v * np.float32(size), layer, [0])[0]
        assert np.isfinite(y).all()
    v[:, 100:228] = 0  # pages of nothing between others
    assert np.isfinite(attend(q, k, v, layer, [0])[0]).all()


def test_one_score_far_above_all_others(isa):
    """A query finds the one key it looks like, wherever it is: raw, stored, in its own page."""
    rng = np.random.default_rng(16)
    shape = Shape(1, 1, 128, (0,), 300)
    layer = kv_cases.layer_of(rng, KVFormat("h4", "h8"), shape, 300)
    _, k, v = kv_cases.tokens(rng, shape, 300)
    for at in (0, 63, 64, 100, 255, 256, 299):
        q = np.zeros_like(k)
        q[:, -1] = 40 * k[:, at]
        y = attend(q, k, v, layer, [0])[0]
        assert np.abs(y[:, -1] - v[:, at]).max() < 0.05


def test_nothing_to_do():
    layer = kv_cases.layer_of(
        np.random.default_rng(0), KVFormat("h4", "h3"), Shape(2, 1, 32, (0, 0), 1), 1
    )
    empty = np.zeros((2, 0, 2, 32), np.float32)
    y, _ = attend(empty, empty[:, :, :1], empty[:, :, :1], layer, [0, 5])
    assert y.shape == empty.shape
    y, after = attend(np.ones((2, 3, 2, 32), np.float32), *[np.ones((2, 3, 1, 32), np.float32)] * 2,
                      layer, [0, 0], [0, 0])  # fmt: skip
    assert not y.any()
    assert untouched(after, layer)


def test_raw_rows_and_pages_of_others_are_untouched(isa):
    """One token: one row of a slot changes, no page does."""
    rng = np.random.default_rng(17)
    shape = Shape(2, 1, 32, (200, 70), 1)
    layer = kv_cases.filled(rng, KVFormat("h4", "h3"), shape, 70)
    tokens = kv_cases.tokens(rng, shape, 1)
    _, after = attend(*tokens, layer, shape.past)
    for name in ("raw_keys", "raw_values"):
        before, now = (getattr(x, name).copy() for x in (layer, after))
        assert np.isfinite(now[0, :, 2, 8]).all()
        for a in (before, now):  # 200 = 3 * 64 + 8, 70 = 64 + 6
            a[0, :, 2, 8] = a[1, :, 2, 6] = 0
        assert before.tobytes() == now.tobytes()
    assert np.array_equal(after.key_pages, layer.key_pages)
    assert np.array_equal(after.value_pages, layer.value_pages)


# ---- half a layer ----


def test_kv_attention_block_is_its_parts(isa):
    """The bits of the ops that it is made of, under every kind of rotation, with any threads."""
    for case in kv_cases.block_cases():
        claims.check(case)
        claims.check_deterministic(case)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_refused_call_leaves_the_cache_alone(name):
    """The number that is not finite comes after tokens that would be taken first."""
    rng, shape = np.random.default_rng(5), Shape(4, 2, 32, (70,), 700)
    layer = kv_cases.filled(rng, KVFormat("h4", "h3"), shape, 700)
    arrays = dict(zip("qkv", kv_cases.tokens(rng, shape, 700), strict=True))
    arrays[name][0, 650, 1, 3] = np.nan
    after = reference_kv.copied(layer)
    with pytest.raises(ContractError, match=f"{name} has a number that is not finite"):
        kv_ops.kv_attend(*arrays.values(), after, [70])
    assert untouched(layer, after)
