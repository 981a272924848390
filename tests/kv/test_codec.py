"""Our codecs: bytes and integers equal the reference's on every instruction set; what a code loses
is what theory says, and nothing is biased."""

from __future__ import annotations

import numpy as np
import pytest

from hadamoe import kv_ops, reference_kv
from hadamoe.errors import ContractError
from hadamoe.kv import KEY_SEED, page_bytes, signs
from hadamoe.verify import claims, kv_cases

BITS = (2, 3, 4, 8)
WIDTHS = (32, 64, 128, 256, 512)


@pytest.mark.parametrize("codec", kv_cases.OURS)
def test_equal_to_the_reference_bit_for_bit(isa, codec):
    """Pages, rows, integer scores, on rows of every kind; every instruction set meets the same."""
    for case in kv_cases.codec_cases(codec):
        claims.check(case)


@pytest.mark.parametrize("codec", kv_cases.OURS)
def test_many_rows_have_the_same_codes_everywhere(isa, codec):
    x = np.random.default_rng(1).standard_normal((40, 64, 128)).astype(np.float32)
    assert np.array_equal(kv_ops.kv_encode(x, codec), reference_kv.kv_encode(x, codec))


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("bits", BITS)
def test_packing_keeps_every_code(bits, d, side):
    codes = np.random.default_rng(d).integers(0, 1 << bits, (64, d), dtype=np.uint8)
    data = reference_kv.pack(codes, bits, side)
    assert data.nbytes + 128 == page_bytes(f"h{bits}", d)
    assert np.array_equal(reference_kv.unpack(data, bits, side, d), codes)


def test_where_a_code_lies():
    """csrc/core/kv_codecs.h in numbers: token 17, column 37 of keys of 64 columns."""
    tile = 17 // 16 * 2 + 37 // 32  # of 16 tokens x 32 columns, tokens' tiles side by side
    term, lane = 37 % 32, 17 % 16  # term 5: byte 1 of word 1
    for bits, groups, byte in ((2, [0], 0x0C), (3, [0, 2], 0x0C), (4, [0], 0xF0), (8, [1], 0xFF)):
        codes = np.zeros((64, 64), np.uint8)
        codes[17, 37] = (1 << bits) - 1
        data = reference_kv.pack(codes, bits, "key")
        (at,) = np.nonzero(data)
        assert at.tolist() == [64 * (tile * bits + g) + 4 * lane + term % 4 for g in groups]
        assert data[at[0]] == byte


@pytest.mark.parametrize("d", [64, 128, 256])
def test_transform_twice_is_d_times_the_identity(d):
    x = np.random.default_rng(d).integers(-99, 100, (5, d)).astype(np.float32)
    assert np.array_equal(reference_kv.hadamard_sum(reference_kv.hadamard_sum(x)), d * x)


def test_tables_are_the_specified_ones():
    for bits, most, kappa in ((2, 90, 59.59375), (3, 88, 40.90625), (4, 104, 38.140625)):
        levels, mids, unit = reference_kv.table(bits)
        assert (levels[-1], unit, len(levels), len(mids)) == (
            most,
            kappa,
            1 << bits,
            (1 << bits) - 1,
        )
        assert np.array_equal(levels, -levels[::-1])
        assert np.array_equal(mids * 2, np.rint(mids * 2))
        # each level is the mean of a Gaussian over its cell, to the rounding of a level
        grid = np.linspace(-6, 6, 1 << 18) * kappa
        weight = np.exp(-((grid / kappa) ** 2) / 2)
        cell = np.searchsorted(mids, grid)
        means = np.bincount(cell, weight * grid) / np.bincount(cell, weight)
        assert np.abs(means - levels).max() < 1.5
        error = (weight * (levels[cell] - grid) ** 2).sum() / (weight * grid**2).sum()
        assert abs(error / reference_kv.ERRORS[bits] - 1) < 1e-3


# ---- what a code loses ----

#: bits -> largest 1 - cos^2 of Gaussian rows, of `native` rows in tens of thousands.
MOST = {2: 0.1185, 3: 0.0350, 4: 0.0096, 8: 6e-5}
#: bits -> (squared error over squared row) with the unbiased scale: D / (1 - D).
EXPECTED = {(2, 128): 0.1305, (2, 256): 0.1319, (3, 128): 0.0348, (3, 256): 0.0353,
            (4, 128): 0.0093, (4, 256): 0.0094}  # fmt: skip


def native(x: np.ndarray, bits: int, **options) -> np.ndarray:
    pages = kv_ops.kv_encode(x, f"h{bits}", **options)
    return kv_ops.kv_decode(pages, f"h{bits}", x.shape[-1], **options)


def in_numpy(x: np.ndarray, bits: int) -> np.ndarray:
    sign = signs(x.shape[-1], KEY_SEED)
    return reference_kv.decode_rows(*reference_kv.encode_rows(x, bits, sign), bits, sign)


def gaussian(d: int, pages: int = 320) -> np.ndarray:
    return kv_cases.rows_of(np.random.default_rng(d), "gaussian", pages, d)


def lost(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Means over rows of 1 - cos^2, |x - y|^2 / |x|^2 and <x, y> / |x|^2, all in f64."""
    x, y = (a.reshape(-1, a.shape[-1]).astype(np.float64) for a in (x, y))
    dot, xx, yy = (x * y).sum(-1), (x * x).sum(-1), (y * y).sum(-1)
    error = ((x - y) ** 2).sum(-1)
    return (1 - dot**2 / (xx * yy)).mean(), (error / xx).mean(), (dot / xx).mean()


def gates(x: np.ndarray, y: np.ndarray, bits: int) -> None:
    """The direction is kept, the length has no bias."""
    angle, error, share = lost(x, y)
    assert angle <= MOST[bits]
    assert abs(share - 1) <= 1e-3
    if bits < 8:
        assert abs(error / EXPECTED[bits, x.shape[-1]] - 1) < 0.02


@pytest.mark.parametrize("d", [128, 256])
@pytest.mark.parametrize("bits", BITS)
def test_error_of_gaussian_rows(bits, d):
    x = gaussian(d)
    gates(x, native(x, bits), bits)
    gates(x, native(x, bits, side="value"), bits)


def fork_table(monkeypatch):
    """The 4-bit table a fork of llama.cpp shipped: means of 16 cells of equal mass."""
    wrong = np.array(
        [0.006938, 0.020989, 0.035597, 0.051262, 0.068756, 0.089527, 0.117195, 0.173926]
    )
    kappa = 104 / 2.7
    levels = tuple(np.rint(wrong * np.sqrt(128) * kappa).astype(int))
    monkeypatch.setitem(reference_kv.TABLES, 4, (levels, kappa))


def boundary_off_by_one(monkeypatch):
    right = reference_kv.table

    def table(bits):
        levels, mids, kappa = right(bits)
        return levels, np.append(mids[1:], np.float32(np.inf)), kappa

    monkeypatch.setattr(reference_kv, "table", table)


def scale_is_the_norm(monkeypatch):
    right = reference_kv.encode_rows

    def encode(x, *rest):
        codes, _ = right(x, *rest)
        return codes, np.linalg.norm(x, axis=-1).astype(np.float16)

    monkeypatch.setattr(reference_kv, "encode_rows", encode)


def signs_missing_once(monkeypatch):
    right = reference_kv.decode_rows
    monkeypatch.setattr(
        reference_kv, "decode_rows", lambda c, nu, bits, sign: right(c, nu, bits, np.abs(sign))
    )


def test_numpy_passes_the_gates():
    x = gaussian(128, 32)
    for bits in (2, 3, 4):
        gates(x, in_numpy(x, bits), bits)


@pytest.mark.parametrize(
    ("mutant", "bits"),
    [
        (fork_table, 4),
        *((boundary_off_by_one, b) for b in (2, 3, 4)),
        *((scale_is_the_norm, b) for b in (2, 3, 4)),
        *((signs_missing_once, b) for b in BITS),
    ],
)
def test_a_mutant_fails_a_gate(monkeypatch, mutant, bits):
    x = gaussian(128, 32)
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        gates(x, in_numpy(x, bits), bits)


#: Rows on which a codec without a rotation, or a rotation without signs, loses nearly everything.
def fixtures(d: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(d)
    common = rng.standard_normal(d) * np.exp(rng.standard_normal(d))
    few = np.zeros((4, 64, d), np.float32)
    few.reshape(-1, d)[np.arange(256), rng.integers(0, d, 256)] = rng.choice([-5, 7], 256)
    return {
        "heavy": kv_cases.rows_of(rng, "heavy", 8, d),
        "one column": few,
        "constant": np.float32(1 + 1e-3 * rng.standard_normal((4, 64, d))),
        "around one vector": np.float32(common + 0.1 * rng.standard_normal((4, 64, d))),
        "tiny": np.float32(1e-5 * rng.standard_normal((4, 64, d))),
    }


def most_of_any_vector(bits: int) -> float:
    """TurboQuant's bound of the mean squared error, whatever the vector (arXiv 2504.19874)."""
    return np.sqrt(3) * np.pi / 2 * 4.0**-bits


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["heavy", "one column", "constant", "around one vector"])
def test_any_vectors_direction_is_within_the_bound(kind, bits):
    for d in (128, 256):
        x = fixtures(d)[kind]
        for side in ("key", "value"):
            angle, _, share = lost(x, native(x, bits, side=side))
            assert angle <= most_of_any_vector(bits)
            assert abs(share - 1) <= 1e-3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_without_signs_constant_rows_leave_the_bound(bits):
    x, ones = fixtures(128)["constant"], np.ones(128, np.float32)
    y = reference_kv.decode_rows(*reference_kv.encode_rows(x, bits, ones), bits, ones)
    assert lost(x, y)[0] > most_of_any_vector(bits)


def test_small_norms_end_where_f16_does():
    """1e-5 per column: the scale is a subnormal f16, still right to its last place."""
    x = fixtures(128)["tiny"]
    y = native(x, 4)
    assert abs(lost(x, y)[2] - 1) < 1e-3
    assert not native(np.float32(1e-9) * gaussian(128, 1), 4).any()


def length_of_the_mean(bits: int, draws: int, decoded) -> float:
    """|mean of decoded rows| / |mean of rows| for 1024 rows with a quarter of their square in
    common, averaged over draws: what is left of the noise is below 0.003."""
    rng, d, ratios = np.random.default_rng(bits), 256, []
    for _ in range(draws):
        mean = rng.standard_normal(d)
        x = mean * (0.5 * np.sqrt(d) / np.linalg.norm(mean)) + rng.standard_normal((16, 64, d))
        x = x.astype(np.float32)
        ends = [a.reshape(-1, d).mean(0, dtype=np.float64) for a in (decoded(x, bits), x)]
        ratios.append(np.linalg.norm(ends[0]) / np.linalg.norm(ends[1]))
    return float(np.mean(ratios))


@pytest.mark.parametrize("bits", BITS)
def test_a_mean_of_many_values_keeps_its_length(monkeypatch, bits):
    assert abs(length_of_the_mean(bits, 16, native) - 1) < 0.005
    if bits < 8:
        scale_is_the_norm(monkeypatch)
        assert abs(length_of_the_mean(bits, 2, in_numpy) - 1) > 0.005


# ---- vectors, scores, edges ----


@pytest.mark.parametrize("codec", kv_cases.OURS)
def test_mean_and_balance_are_what_one_could_do_outside(codec):
    rng = np.random.default_rng(3)
    d = 128
    x, pair = kv_cases.rows_of(rng, "heavy", 2, d), kv_cases.vectors_of(rng, d)
    mean, balance = pair
    pages = kv_ops.kv_encode(x, codec, vectors=pair)
    assert np.array_equal(pages, kv_ops.kv_encode((x - mean) * balance, codec))
    plain = kv_ops.kv_decode(pages, codec, d)
    assert np.array_equal(kv_ops.kv_decode(pages, codec, d, vectors=pair), plain / balance + mean)
    q = rng.standard_normal((9, d)).astype(np.float32)
    found, outside = (
        kv_ops.kv_scores(q, pages, codec, vectors=pair),
        kv_ops.kv_scores(q / balance, pages, codec),
    )
    assert all(np.array_equal(a, b) for a, b in zip(found, outside, strict=True))
    without = kv_ops.kv_encode(x, codec, vectors=(0 * mean, 1 + 0 * balance))
    assert not np.array_equal(without, pages)
    assert np.array_equal(without, kv_ops.kv_encode(x, codec))


@pytest.mark.parametrize("codec", kv_cases.OURS)
def test_scores_are_products_with_what_pages_stand_for(codec):
    """unit * scale * integer = q . row, but for the query's own 8 bits."""
    rng = np.random.default_rng(4)
    d, bits = 128, reference_kv.bits_of(codec)
    x, q = kv_cases.rows_of(rng, "gaussian", 3, d), rng.standard_normal((7, d)).astype(np.float32)
    pages = kv_ops.kv_encode(x, codec)
    _, unit, scores = kv_ops.kv_scores(q, pages, codec)
    nu = pages[:, -128:].copy().view(np.float16).reshape(-1)
    got = scores * unit[:, None] * reference_kv.unit_of(nu, bits, d)
    want = q.astype(np.float64) @ kv_ops.kv_decode(pages, codec, d).reshape(-1, d).T
    noise = 4 * (unit / np.sqrt(12))[:, None] * np.sqrt(d)  # rounding a query: 4 deviations
    assert (np.abs(got - want) <= noise * 1.2).all()
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.9999


def test_the_largest_integers(isa):
    """Every product as large as it can be: 127 * 127 * 512 of one sign, in 8 bits and in fewer."""
    d = 512
    q = reference_kv.hadamard_sum(np.ones((1, d), np.float32)) * signs(d, KEY_SEED)  # r: all equal
    q = np.concatenate([q, -q])
    for codec, level in (("h8", 127), ("h4", 104), ("h3", 88), ("h2", 90)):
        codes = np.zeros((1, page_bytes(codec, d)), np.uint8)
        fill = {"h8": 255}.get(codec, 0xFF)
        codes[:, : codes.shape[1] - 128] = fill
        q8, _, scores = kv_ops.kv_scores(q, codes, codec)
        assert (np.abs(q8) == 127).all()
        assert np.array_equal(scores, np.array([[1], [-1]]) * 127 * level * d * np.ones((1, 64)))
        codes[:, : codes.shape[1] - 128] = 0
        least = -128 if codec == "h8" else -level
        _, _, scores = kv_ops.kv_scores(q, codes, codec)
        assert np.array_equal(scores, np.array([[1], [-1]]) * 127 * least * d * np.ones((1, 64)))


@pytest.mark.parametrize("codec", kv_cases.OURS)
def test_edge_rows(isa, codec):
    rng, d = np.random.default_rng(5), 256
    x = np.zeros((1, 64, d), np.float32)
    x[0, 1], x[0, 2], x[0, 3], x[0, 4] = 1e4, 1e9, 1e-9, 3
    x[0, 5, 7] = -2
    x[0, 6] = 1e4 * rng.standard_normal(d)
    pages = kv_ops.kv_encode(x, codec)
    nu = pages[0, -128:].copy().view(np.float16)
    y = kv_ops.kv_decode(pages, codec, d)[0]
    assert np.isfinite(y).all()
    assert not y[0].any()
    assert not y[7:].any()
    assert nu[0] == 0
    assert nu[2] == 65504
    if codec != "h8":  # 1e4 * sqrt(256) = 1.6e5: shorter than it was, its direction kept
        assert nu[1] == nu[6] == 65504
    for row in (1, 4, 6):
        cos = x[0, row] @ y[row].astype(np.float64)
        cos /= np.linalg.norm(x[0, row].astype(np.float64)) * np.linalg.norm(
            y[row].astype(np.float64)
        )
        assert 1 - cos**2 < 0.2
    mean = np.full(d, 2, np.float32)
    pair = (mean, np.ones(d, np.float32))
    again = kv_ops.kv_decode(kv_ops.kv_encode(x, codec, vectors=pair), codec, d, vectors=pair)
    assert np.isfinite(again).all()


@pytest.mark.parametrize("codec", kv_cases.OURS)
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(codec, number):
    x = np.zeros((2, 64, 64), np.float32)
    x[1, 5, 63] = number
    with pytest.raises(ContractError) as error:
        kv_ops.kv_encode(x, codec)
    dims = f"[d=64 n={page_bytes(codec, 64)} p=2 u=64 z=1]"
    assert str(error.value) == f"kv_encode: rows has a number that is not finite at 4479 {dims}"
    with pytest.raises(ContractError) as error:
        kv_ops.kv_scores(x[1], kv_ops.kv_encode(x[:1], codec), codec)
    dims = f"[d=64 n={page_bytes(codec, 64)} p=1 r=64 t=64]"
    assert str(error.value) == f"kv_scores: q has a number that is not finite at 383 {dims}"
