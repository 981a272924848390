"""Recorded keys and values of other software, and of the prototype of our own codecs."""

from __future__ import annotations

import numpy as np
import pytest

from hadamoe import kv_ops, ops, reference_kv
from hadamoe import reference_kv_peers as peers
from hadamoe.bf16 import from_bf16, to_bf16
from hadamoe.kv import KEY_SEED, PAGE, VALUE_SEED, KVFormat, signs

SIDES = (("k", "key"), ("v", "value"))
# 1 - cos^2 a codec of so many bits may lose on Gaussian rows
GATES = {2: 0.1185, 3: 0.0350, 4: 0.0096}


@pytest.fixture(params=["numpy", *ops.isas()])
def codecs(request):
    """Module with kv_encode, kv_decode, kv_scores, kv_attend: numpy, then every instruction set."""
    before = ops.isa()
    if request.param != "numpy":
        ops.set_isa(request.param)
    yield reference_kv if request.param == "numpy" else kv_ops
    ops.set_isa(before)


def paged(x):
    """f32 ``[n, d]`` -> ``[p, 64, d]``, zeros behind the last row."""
    return np.pad(x, [(0, -len(x) % PAGE), (0, 0)]).reshape(-1, PAGE, x.shape[1])


def split(pages, *sizes):
    """The arrays one after the other in pages, each ``[p * 64, bytes of a token]``."""
    parts = np.split(pages, np.cumsum(sizes)[:-1] * PAGE, axis=1)
    return [np.ascontiguousarray(a).reshape(-1, n) for a, n in zip(parts, sizes, strict=True)]


def ulps(a, b):
    kind = {2: np.int16, 4: np.int32}[a.itemsize]
    return np.abs(a.view(kind).astype(np.int64) - b.view(kind)).max()


def loss(x, y):
    """Mean of 1 - cos^2 between rows."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    return np.mean(1 - (x * y).sum(-1) ** 2 / ((x**2).sum(-1) * (y**2).sum(-1)))


@pytest.mark.parametrize(
    ("d", "seed", "masks"),
    [
        (64, KEY_SEED, "4896ab71 9d21b7fd"),
        (64, VALUE_SEED, "94de4944 dca61ec6"),
        (128, KEY_SEED, "95c620f2 9563fdaf b57cc82a eb9fa621"),
        (128, VALUE_SEED, "f487beb6 20d11c7d 2e20dbe6 a600591c"),
        (
            256, KEY_SEED,
            "9d19cfed ef32b5ee 5692eb90 2c63a136 c5d00d64 4dd8a28c a8cf2694 01743ca8",
        ),
        (
            256, VALUE_SEED,
            "a9182d0e 83582fa4 36255bdd 20e67e29 4bf714e8 de901f92 737d0b99 06c07386",
        ),
    ],
)  # fmt: skip
def test_signs_are_mlx_random(d, seed, masks):
    negative = np.packbits(signs(d, seed) < 0, bitorder="little").view(np.uint32)
    assert " ".join(f"{word:08x}" for word in negative) == masks


def test_codebooks(golden):
    swift = golden("kv_swift")
    for side, bits in (("k", 4), ("v", 2)):
        table = peers.TURBO_CODEBOOKS[128, bits]
        assert np.array_equal(table, swift[f"{side}_codebook"])
        assert np.array_equal((table[1:] + table[:-1]) / np.float32(2), swift[f"{side}_boundaries"])
    for name, formats in (("kv_hkv_k4v3", (4, 3)), ("kv_hkv_k4v2", (4, 2))):
        for side, bits in zip("kv", formats, strict=True):
            levels, _, kappa = reference_kv.table(bits)
            assert np.array_equal(levels, golden(name)[f"{side}_codebook"])
            assert kappa == golden(name)[f"{side}_kappa"]


@pytest.mark.parametrize("kind", ["gauss", "heavy"])
@pytest.mark.parametrize(("short", "side", "bits"), [("k", "key", 4), ("v", "value", 2)])
def test_turbo_as_mlx_swift(codecs, golden, kind, short, side, bits):
    g, codec = golden("kv_swift"), f"turbo{bits}"
    x, words, norms, rows, ties = (
        g[f"{kind}_{short}_{key}"] for key in ("x", "words", "norms", "rows", "ties")
    )
    pages = codecs.kv_encode(paged(x), codec, side=side)
    mine, mine_norms = split(pages, words.shape[1] * 4, 4)
    differ = np.argwhere(peers.unpack(mine, bits) != peers.unpack(words, bits))
    assert {tuple(at) for at in differ} <= {tuple(at) for at in ties}
    assert ulps(mine_norms.view(np.float32)[:, 0], norms) <= 1
    if not len(differ):
        assert np.array_equal(mine.view(np.uint32), words)

    theirs = [words.view(np.uint8), norms[:, None].view(np.uint8)]
    theirs = np.concatenate([a.reshape(2, -1) for a in theirs], 1)
    decoded = codecs.kv_decode(theirs, codec, 128, side=side).reshape(-1, 128)
    assert np.abs(decoded[:16] - rows).max() <= 4e-7 * np.abs(rows).max()
    seed = KEY_SEED if side == "key" else VALUE_SEED
    assert np.array_equal(decoded, peers.turbo_decode(words, norms, bits, seed))


def test_calibrated_turbo_keys_are_read(golden):
    g = golden("kv_swift")
    words, norms, rows = (g[f"heavy_stretched_{key}"] for key in ("words", "norms", "rows"))
    read = peers.turbo_decode(words, norms, 4, KEY_SEED, g["heavy_stretch"])
    assert np.abs(read - rows).max() <= 1e-6 * np.abs(rows).max()
    assert loss(g["heavy_k_x"][:16], read) < 0.02
    assert loss(g["heavy_k_x"][:16], peers.turbo_decode(words, norms, 4, KEY_SEED)) > 0.03


@pytest.mark.parametrize("mode", ["plain", "calib"])
@pytest.mark.parametrize("kind", ["gauss", "heavy"])
@pytest.mark.parametrize(("name", "formats"), [("kv_hkv_k4v3", (4, 3)), ("kv_hkv_k4v2", (4, 2))])
def test_our_codecs_as_their_prototype(codecs, golden, name, formats, kind, mode):
    g = golden(name)
    vectors = (g[f"{kind}_mean"], g[f"{kind}_balance"]) if mode == "calib" else None
    for (short, side), bits in zip(SIDES, formats, strict=True):
        x, words, nu = (
            g[f"{kind}_{short}_x"],
            *(g[f"{kind}_{mode}_{short}_{k}"] for k in ("words", "nu")),
        )
        codec, d, n = f"h{bits}", x.shape[1], len(x)
        options = {"side": side, "vectors": vectors if side == "key" else None}
        pages = codecs.kv_encode(paged(x), codec, **options)
        codes, scales = reference_kv.parts_of(pages, codec, d, side)
        assert np.array_equal(codes[:n], peers.unpack(words, bits))
        assert np.array_equal(peers.pack(codes[:n], bits).view(np.uint32), words)
        assert ulps(scales[:n], nu) <= 1
        decoded = codecs.kv_decode(pages, codec, d, **options).reshape(-1, d)[:n]
        seed = KEY_SEED if side == "key" else VALUE_SEED
        want = reference_kv.decode_rows(codes[:n], nu, bits, signs(d, seed), options["vectors"])
        assert np.abs(decoded - want).max() <= 1e-6 * np.abs(want).max()
        if side == "key":
            scores = codecs.kv_scores(g[f"{kind}_q"], pages, codec, vectors=vectors)[2][:, :n]
            assert np.array_equal(scores, g[f"{kind}_{mode}_scores"])


@pytest.mark.parametrize("mode", ["plain", "calib"])
@pytest.mark.parametrize("kind", ["gauss", "heavy"])
def test_attention_as_the_prototype(codecs, golden, kind, mode):
    """300 stored tokens. All others, those seen as they are among them, have a weight of 0."""
    g, d = golden("kv_hkv_k4v3"), 128
    q = g[f"{kind}_q"]
    q, want = q[: len(q) // 2], g[f"{kind}_{mode}_y"]
    want = want[: len(q)]
    away = np.linalg.lstsq(q, np.full(len(q), -2e4), rcond=None)[0]  # q . away = -20000
    n, tokens = 300, 6 * PAGE + 1
    keys, values = np.tile(away, (tokens, 1)), np.zeros((tokens, d))
    keys[PAGE : PAGE + n], values[PAGE : PAGE + n] = g[f"{kind}_k_x"], g[f"{kind}_v_x"]
    k, v = (np.float32(a)[None, :, None] for a in (keys, values))
    ones, zeros = np.ones(d, np.float32), np.zeros(d, np.float32)
    vectors = [g[f"{kind}_mean"], g[f"{kind}_balance"], zeros, ones] if mode == "calib" else None
    raw, place = np.zeros((1, 1, 3, PAGE, d), np.float32), np.arange(-1, 6, dtype=np.int32)
    layer = kv_ops.KVLayer(
        KVFormat("h4", "h3"), raw, raw.copy(), np.zeros((6, 1, 64 * 66), np.uint8),
        np.zeros((6, 1, 64 * 50), np.uint8), place[None],
        vectors=None if vectors is None else np.stack(vectors)[:, None],
    )  # fmt: skip
    queries = np.zeros((1, tokens, len(q), d), np.float32)
    queries[0, -1] = q
    out = codecs.kv_attend(queries, k, v, layer, [0])
    y = (out[0] if codecs is reference_kv else out)[0, -1]
    assert np.abs(y - want).max() <= 3e-4 * np.abs(want).max()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["gauss", "heavy"])
def test_affine_as_mlx(codecs, golden, kind, bits):
    g, codec = golden("kv_affine"), f"affine{bits}"
    words, scales, biases, rows = (
        g[f"{kind}_{key}{bits}"] for key in ("words", "scales", "biases", "xhat")
    )
    pages = codecs.kv_encode(from_bf16(g[f"{kind}_x"])[None], codec)
    for mine, want in zip(
        split(pages, 256 * bits // 8, 8, 8), (words, scales, biases), strict=True
    ):
        assert np.array_equal(mine.view(want.dtype), want)
    decoded = codecs.kv_decode(pages, codec, 256)[0]
    assert np.array_equal(decoded, peers.affine_decode(words, scales, biases, bits))
    # mlx computes in bf16, which rounds twice
    step = from_bf16(scales).repeat(64, 1) * peers.unpack(words, bits)
    twice = to_bf16(from_bf16(to_bf16(step)) + from_bf16(biases).repeat(64, 1))
    assert np.array_equal(twice, rows)


@pytest.mark.parametrize("scale", ["1.0", "0.5", "0.03125"])
@pytest.mark.parametrize("kind", ["heavy", "edge"])
def test_fp8_as_torch(codecs, golden, kind, scale):
    g = golden("kv_fp8")
    x, codes = g[f"{kind}_x"], g[f"{kind}_{scale}"]
    pages = codecs.kv_encode(paged(x), "fp8", scale=float(scale))
    mine = pages.reshape(-1, 256)[:16]
    assert np.array_equal(mine, codes)
    decoded = codecs.kv_decode(pages, "fp8", 256, scale=float(scale))[0, :16]
    assert np.array_equal(decoded, g["values"][codes] * np.float32(scale))


def test_fp8_numbers_and_ties(codecs, golden):
    g = golden("kv_fp8")
    x = np.zeros((1, PAGE, 32), np.float32)
    x[0, 0, :16] = g["ties_x"]
    page = codecs.kv_encode(x, "fp8")
    assert np.array_equal(page[0, :16], g["ties_bytes_satfinite"])
    finite = g["codes"][np.isfinite(g["values"])]
    page = np.resize(finite, (1, PAGE * 32))
    decoded = codecs.kv_decode(page, "fp8", 32)
    assert np.array_equal(decoded.reshape(-1), g["values"][page[0]])
    assert np.array_equal(codecs.kv_encode(decoded, "fp8"), page)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", ["gauss", "heavy"])
@pytest.mark.parametrize(("short", "side"), SIDES)
def test_kivi(codecs, golden, short, side, kind, bits):
    g, codec = golden("kv_kivi"), f"kivi{bits}"
    codes, scale, least = (g[f"{kind}_{short}{bits}_{key}"] for key in ("codes", "scale", "min"))
    pages = codecs.kv_encode(g[f"{kind}_{short}_x"][None], codec, side=side)
    mine, *others = split(pages, 256 * bits // 8, 16, 16)
    assert np.array_equal(peers.unpack(mine, bits), codes)
    for a, want in zip(others, (scale, least), strict=True):
        assert np.array_equal(a.view(np.float16).reshape(want.shape), want)
    decoded = codecs.kv_decode(pages, codec, 256, side=side)[0]
    assert np.array_equal(decoded, peers.kivi_decode(codes, scale, least, side))


def test_the_gate_tells_a_wrong_codebook(codecs, golden):
    """A llama.cpp fork's turbo4 had means of equally likely ranges for centroids."""
    g = golden("kv_ggml")
    assert loss(g["x"], g["rows"]) > 1.7 * GATES[4]
    for bits, gate in GATES.items():
        for codec in (f"h{bits}", f"turbo{bits}"):
            rows = codecs.kv_decode(codecs.kv_encode(paged(g["x"]), codec), codec, 128)
            assert loss(g["x"], rows.reshape(-1, 128)) <= gate, codec
