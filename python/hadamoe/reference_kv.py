"""What the quantized KV cache means, in numpy: our codecs, how their bytes lie, attention.

Codecs ``h2 h3 h4 h8`` repeat the kernels' f32 steps one by one (no fused multiply-add, sums in a
fixed order), so codes and scales are compared bit for bit. Attention is f64, the numbers the
kernels approximate, on the same exact integers. Shapes and dtypes are those of `hadamoe.kv_ops`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from . import reference_kv_peers
from .bf16 import from_bf16, to_bf16
from .kv import KEY_SEED, PAGE, VALUE_SEED, page_bytes, signs

#: bits -> positive levels, kappa: int8 tables of the least squared error for a Gaussian.
TABLES = {
    2: ((27, 90), 59.59375),
    3: ((10, 31, 55, 88), 40.90625),
    4: ((5, 15, 25, 36, 48, 62, 79, 104), 38.140625),
}
#: bits -> that error, relative to the Gaussian's variance; 8 bits: too small to correct.
ERRORS = {2: 0.117482, 3: 0.034549, 4: 0.009506, 8: 0.0}
_SEEDS = {"key": KEY_SEED, "value": VALUE_SEED}


def table(bits: int) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Levels i8 ``[2^bits]``, f32 middles between them, kappa (levels per deviation)."""
    positive, kappa = TABLES[bits]
    levels = np.array([-n for n in positive[::-1]] + [*positive], np.int8)
    wide = levels.astype(np.float32)
    return levels, (wide[1:] + wide[:-1]) / np.float32(2), np.float32(kappa)


def lane_sum(x: np.ndarray) -> np.ndarray:
    """f32 sum of the last axis in one order: lane l adds x[l], x[l + 32] ...; lanes join by xor."""
    lanes = x.reshape(*x.shape[:-1], -1, 32)
    total = lanes[..., 0, :]
    for i in range(1, lanes.shape[-2]):
        total = total + lanes[..., i, :]
    for step in (16, 8, 4, 2, 1):
        total = total + total[..., np.arange(32) ^ step]
    return total[..., 0]


def hadamard_sum(x: np.ndarray) -> np.ndarray:
    """Unnormalised Walsh-Hadamard transform of the last axis, f32, neighbours first."""
    shape, h = x.shape, 1
    while h < shape[-1]:
        a, b = np.moveaxis(x.reshape(*shape[:-1], -1, 2, h), -2, 0)
        x, h = np.stack([a + b, a - b], -2).reshape(shape), 2 * h
    return x


def _root(d: int) -> np.float32:
    return np.float32(1 / np.sqrt(d))


def _pair(vectors: Any, d: int) -> tuple[np.ndarray, np.ndarray]:
    """(mean, balance), 0 and 1 where there are none."""
    mean, balance = (None, None) if vectors is None else vectors
    mean = np.zeros(d, np.float32) if mean is None else np.float32(mean)
    return mean, np.ones(d, np.float32) if balance is None else np.float32(balance)


def encode_rows(x, bits: int, sign: np.ndarray, vectors: Any = None):
    """f32 ``[..., d]`` -> codes u8 ``[..., d]``, scales f16 ``[...]``.

    The scale makes a row's product with what it stands for the row's own square: it has no bias
    (Zandieh et al. 2025, arXiv 2504.19874, correct it with further bits instead). It ends at 65504,
    f16's largest. Codes of 8 bits are levels plus 128.
    """
    d = x.shape[-1]
    mean, balance = _pair(vectors, d)
    x = (np.asarray(x, np.float32) - mean) * balance
    y, most = hadamard_sum(x * sign), np.float32(65504)
    if bits == 8:
        y = y * _root(d)
        nu = np.minimum(np.abs(y).max(-1) / np.float32(127), most).astype(np.float16)
        unit = np.where(nu == 0, np.inf, nu).astype(np.float32)[..., None]
        return (np.clip(np.rint(y / unit), -127, 127) + 128).astype(np.uint8), nu
    levels, mids, kappa = table(bits)
    norm = np.sqrt(lane_sum(x * x))
    some = norm > 0
    v = y * np.where(some, 1 / np.where(some, norm, 1), 0).astype(np.float32)[..., None] * kappa
    codes = (v[..., None] > mids).sum(-1, dtype=np.uint8)
    dot = lane_sum(v * levels[codes].astype(np.float32))
    nu = norm * (np.float32(d) * kappa * kappa) / np.where(dot > 0, dot, np.float32(1))
    return codes, np.minimum(np.where(some, nu, 0), most).astype(np.float16)


def levels_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """i32 levels that codes stand for."""
    return codes.astype(np.int32) - 128 if bits == 8 else table(bits)[0][codes].astype(np.int32)


def unit_of(nu: np.ndarray, bits: int, d: int) -> np.ndarray:
    """f32: what one level of a row is worth in the rotated basis."""
    nu = np.asarray(nu).astype(np.float32)
    return nu if bits == 8 else nu * (_root(d) / table(bits)[2])


def decode_rows(codes, nu, bits: int, sign: np.ndarray, vectors: Any = None) -> np.ndarray:
    """What codes and scales stand for, rotation undone: f32 ``[..., d]``."""
    d = codes.shape[-1]
    mean, balance = _pair(vectors, d)
    y = levels_of(codes, bits).astype(np.float32) * unit_of(nu, bits, d)[..., None]
    return hadamard_sum(y) * _root(d) * sign / balance + mean


def _planes(bits: int) -> list[tuple[int, int]]:
    """(lowest bit, width) of what a tile keeps one after the other."""
    return [(0, 2), (2, 1)] if bits == 3 else [(0, bits)]


def pack(codes: np.ndarray, bits: int, side: str) -> np.ndarray:
    """Codes u8 ``[64, d]`` -> u8 ``[8 d bits]`` as ``csrc/core/kv_codecs.h`` lays them out."""
    lanes = codes if side == "key" else codes.T
    tiles = lanes.reshape(len(lanes) // 16, 16, -1, 32).swapaxes(1, 2)
    planes = []
    for low, width in _planes(bits):
        fields = (tiles >> low & (1 << width) - 1).reshape(*tiles.shape[:3], width, 8 // width, 4)
        shifts = (np.arange(8 // width) * width).astype(np.uint8)[:, None]
        words = (fields << shifts).sum(-2, dtype=np.uint8)  # [blocks, tiles, lanes, groups, bytes]
        planes.append(words.swapaxes(2, 3).reshape(*tiles.shape[:2], -1))
    return np.concatenate(planes, -1).reshape(-1)


def unpack(data: np.ndarray, bits: int, side: str, d: int) -> np.ndarray:
    """Codes u8 ``[64, d]`` of `pack`."""
    blocks, terms = (4, d) if side == "key" else (d // 16, 64)
    data = data.reshape(blocks, terms // 32, bits * 64)
    tiles = np.zeros((blocks, terms // 32, 16, 32), np.uint8)
    for low, width in _planes(bits):
        words, data = data[..., : width * 64], data[..., width * 64 :]
        words = words.reshape(blocks, -1, width, 16, 1, 4).swapaxes(2, 3)
        shifts = (np.arange(8 // width) * width).astype(np.uint8)[:, None]
        tiles |= (words >> shifts & (1 << width) - 1).reshape(tiles.shape) << low
    lanes = tiles.swapaxes(1, 2).reshape(blocks * 16, terms)
    return lanes if side == "key" else lanes.T


def bits_of(codec: str) -> int:
    """Bits of a code of ours; 0 for a codec whose rows attention decodes."""
    return int(codec[1:]) if codec[0] == "h" else 0


def kv_encode(rows, codec: str, *, side="key", vectors=None, scale=1.0) -> np.ndarray:
    """`kv_ops.kv_encode`: f32 ``[p, 64, d]`` -> u8 ``[p, bytes]``."""
    if codec == "bf16":
        return to_bf16(np.float32(rows)).view(np.uint8).reshape(len(rows), -1)
    if not bits_of(codec):
        return reference_kv_peers.kv_encode(rows, codec, side=side, scale=scale)
    bits, d = bits_of(codec), rows.shape[-1]
    rows = zip(*encode_rows(rows, bits, signs(d, _SEEDS[side]), vectors), strict=True)
    pages = [np.concatenate([pack(c, bits, side), n.view(np.uint8)]) for c, n in rows]
    return np.array(pages, np.uint8).reshape(-1, page_bytes(codec, d))


def parts_of(pages, codec: str, head_dim: int, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes u8 ``[64 p, d]`` and scales f16 ``[64 p]`` of pages of one of our codecs."""
    bits = bits_of(codec)
    cut = 8 * head_dim * bits
    codes = [unpack(page[:cut], bits, side, head_dim) for page in pages]
    nu = np.ascontiguousarray(pages[:, cut:]).view(np.float16).reshape(-1)
    return np.array(codes, np.uint8).reshape(-1, head_dim), nu


def kv_decode(pages, codec: str, head_dim: int, *, side="key", vectors=None, scale=1.0):
    """`kv_ops.kv_decode`: u8 ``[p, bytes]`` -> f32 ``[p, 64, d]``."""
    if codec == "bf16":
        return from_bf16(np.ascontiguousarray(pages).view(np.uint16)).reshape(-1, PAGE, head_dim)
    if not bits_of(codec):
        return reference_kv_peers.kv_decode(pages, codec, head_dim, side=side, scale=scale)
    codes, nu = parts_of(pages, codec, head_dim, side)
    sign = signs(head_dim, _SEEDS[side])
    rows = decode_rows(codes, nu, bits_of(codec), sign, vectors)
    return rows.reshape(-1, PAGE, head_dim)


def quantize_query(q, balance=None) -> tuple[np.ndarray, np.ndarray]:
    """f32 ``[r, d]`` -> q8 i8 ``[r, d]`` in the keys' rotated basis, unit f32 ``[r]``."""
    d = q.shape[-1]
    q = np.asarray(q, np.float32) / _pair((None, balance), d)[1]
    r = hadamard_sum(q * signs(d, KEY_SEED)) * _root(d)
    unit = np.abs(r).max(-1) / np.float32(127)
    unit = np.where(unit > 0, unit, np.float32(1))
    return np.rint(r / unit[:, None]).astype(np.int8), unit


def kv_scores(q, pages, codec: str, *, vectors=None):
    """`kv_ops.kv_scores`: q8 i8 ``[r, d]``, unit f32 ``[r]``, scores i32 ``[r, 64 p]``, exactly."""
    q8, unit = quantize_query(q, None if vectors is None else vectors[1])
    codes, _ = parts_of(pages, codec, q.shape[-1], "key")
    scores = q8.astype(np.int64) @ levels_of(codes, bits_of(codec)).astype(np.int64).T
    return q8, unit, scores.astype(np.int32)


class Seen(NamedTuple):
    """What n queries of one head see, f64. Raw tokens first the sink page's, then their own page's.

    Attributes:
        raw_scores, coded_scores: ``[n, tokens]``, -inf where a query is before a token.
        raw_values, coded_values: ``[tokens, d]``; coded rows of ours in the rotated basis.
        nu: ``[coded tokens]``, stored scales of coded values of ours; else 0.
    """

    raw_scores: np.ndarray
    coded_scores: np.ndarray
    raw_values: np.ndarray
    coded_values: np.ndarray
    nu: np.ndarray


def widen(a: np.ndarray) -> np.ndarray:
    """f32, f16 or bf16 (uint16) numbers as f32."""
    return from_bf16(a) if a.dtype == np.uint16 else a.astype(np.float32)


def narrow(a: np.ndarray, dtype) -> np.ndarray:
    """f32 numbers as ``dtype``, uint16 being bf16."""
    return to_bf16(a) if dtype == np.uint16 else a.astype(dtype)


def slot_of(page: int) -> int:
    """The raw slot of a page."""
    return 1 + page % 2 if page else 0


def pages_seen(layer, i: int, j: int, page: int):
    """Pages of keys and of values that queries in ``page`` of sequence i see as stored."""
    first = max(1, page - layer.window) if layer.window else 1
    places = np.asarray(layer.table)[i, first:page]
    return layer.key_pages[places, j], layer.value_pages[places, j]


def _key_scores(layer, j: int, q: np.ndarray, pages: np.ndarray) -> np.ndarray:
    codec, d = layer.format[0], q.shape[-1]
    bits, wide = bits_of(codec), q.astype(np.float64)
    if not bits:
        scale = 1.0 if layer.scales is None else layer.scales[0]
        return wide @ kv_decode(pages, codec, d, scale=scale).reshape(-1, d).T.astype(np.float64)
    vectors = None if layer.vectors is None else layer.vectors[:2, j]
    _, unit, scores = kv_scores(q, pages, codec, vectors=vectors)
    nu = parts_of(pages, codec, d, "key")[1].astype(np.float64)
    worth = nu if bits == 8 else nu / (TABLES[bits][1] * np.sqrt(d))
    centre = 0 if vectors is None else wide @ vectors[0].astype(np.float64)
    return scores * unit.astype(np.float64)[:, None] * worth + np.reshape(centre, (-1, 1))


def _value_rows(layer, pages: np.ndarray, d: int) -> tuple[np.ndarray, np.ndarray]:
    codec = layer.format[1]
    bits = bits_of(codec)
    if not bits:
        scale = 1.0 if layer.scales is None else layer.scales[1]
        rows = kv_decode(pages, codec, d, side="value", scale=scale).reshape(-1, d)
        return rows.astype(np.float64), np.zeros(len(rows))
    codes, nu = parts_of(pages, codec, d, "value")
    nu = nu.astype(np.float64)
    worth = nu if bits == 8 else nu / (TABLES[bits][1] * np.sqrt(d))
    return levels_of(codes, bits) * worth[:, None], nu


def seen_by(layer, i: int, j: int, first: int, q: np.ndarray) -> Seen:
    """What queries f32 ``[n, r, d]`` of tokens first .. first + n - 1, all of one page, see."""
    (n, r, d), page, begin = q.shape, first // PAGE, first % PAGE
    slots = [0, slot_of(page)] if page else [0]
    raw = [widen(a[i, j, slots]).reshape(-1, d) for a in (layer.raw_keys, layer.raw_values)]
    keys, values = (a[: (len(slots) - 1) * PAGE + begin + n].astype(np.float64) for a in raw)
    flat, root = q.reshape(n * r, d), np.sqrt(d)
    end = len(keys) - n + np.arange(n).repeat(r)[:, None]
    scores = flat.astype(np.float64) @ keys.T / root
    scores = np.where(np.arange(len(keys)) <= end, scores, -np.inf)
    key_pages, value_pages = pages_seen(layer, i, j, page)
    coded = _key_scores(layer, j, flat, key_pages) / root
    return Seen(scores, coded, values, *_value_rows(layer, value_pages, d))


def softmax(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """What each token weighs: raw, coded, f64 ``[n, tokens]``."""
    scores = np.concatenate([seen.raw_scores, seen.coded_scores], 1)
    p = np.exp(scores - scores.max(1, keepdims=True))
    raw, coded = np.split(p / p.sum(1, keepdims=True), [seen.raw_scores.shape[1]], 1)
    return raw, coded


def correction(bits: int, coded: np.ndarray, nu: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Wiener's factor ``[n]``: what is left of a coded part's square without its noise.

    The codes' errors are independent: ERRORS (1 - ERRORS) sum (p nu)^2 of the square is theirs.
    """
    noise = ERRORS[bits] * (1 - ERRORS[bits]) * (coded**2 @ nu**2)
    return np.maximum(0, 1 - noise / np.maximum((part**2).sum(1), 1e-300))


def join(layer, j: int, seen: Seen, raw, coded, part) -> np.ndarray:
    """Values weighed, f64 ``[n, d]``; ``part`` is the stored ones' sum, in our codecs' basis."""
    bits, d = bits_of(layer.format[1]), part.shape[1]
    if bits:
        mean, balance = _pair(None if layer.vectors is None else layer.vectors[2:, j], d)
        part = part * correction(bits, coded, seen.nu, part)[:, None]
        part = hadamard_sum(part) / np.sqrt(d) * signs(d, VALUE_SEED) / balance
        part = part + coded.sum(1, keepdims=True) * mean
    return raw @ seen.raw_values + part


def combine(layer, j: int, seen: Seen) -> np.ndarray:
    """softmax(scores) values f64 ``[n, d]``, stored values' noise taken out."""
    raw, coded = softmax(seen)
    return join(layer, j, seen, raw, coded, coded @ seen.coded_values)


def append(layer, i: int, first: int, k: np.ndarray, v: np.ndarray) -> None:
    """Writes tokens f32 ``[n, g, d]`` of one page of sequence i; stores the page if now full."""
    page, begin, n = first // PAGE, first % PAGE, len(k)
    for side, raw, new in ((0, layer.raw_keys, k), (1, layer.raw_values, v)):
        raw[i, :, slot_of(page), begin : begin + n] = narrow(new, raw.dtype).swapaxes(0, 1)
        if page == 0 or begin + n < PAGE:
            continue
        pages = (layer.key_pages, layer.value_pages)[side]
        for j in range(raw.shape[1]):
            vectors = None if layer.vectors is None else layer.vectors[2 * side : 2 * side + 2, j]
            scale = 1.0 if layer.scales is None else layer.scales[side]
            options = {"side": ("key", "value")[side], "vectors": vectors, "scale": scale}
            rows = widen(raw[i, j, slot_of(page)])[None]
            pages[layer.table[i, page], j] = kv_encode(rows, layer.format[side], **options)[0]


def walk(q, k, v, layer, lengths, counts=None):
    """Appends to the layer in place; yields (sequence, rows of q, first token) page by page."""
    b, t = (k if q is None else q).shape[:2]
    for i, count in enumerate([t] * b if counts is None else counts):
        begin = lengths[i] - (count if k is None else 0)
        cuts = [begin, *range((begin // PAGE + 1) * PAGE, begin + count, PAGE), begin + count]
        for first, last in pairwise(cuts[: len(cuts) if count else 0]):
            rows = slice(t - count + first - begin, t - count + last - begin)
            if k is not None:
                append(layer, i, first, widen(k[i, rows]), widen(v[i, rows]))
            if q is not None:
                yield i, rows, first


def copied(layer):
    """The layer with arrays of its own."""
    names = ("raw_keys", "raw_values", "key_pages", "value_pages")
    return layer._replace(**{name: getattr(layer, name).copy() for name in names})


def kv_attend(q, k, v, layer, lengths, counts=None):
    """`kv_ops.kv_attend` in f64, tokens in order: (y ``[b, t, h, d]`` or None, layer after it)."""
    layer, y = copied(layer), None if q is None else np.zeros(q.shape)
    groups = layer.raw_keys.shape[1]
    for i, rows, first in walk(q, k, v, layer, lengths, counts):
        for j, part in enumerate(np.split(widen(q[i, rows]), groups, 1)):
            out = combine(layer, j, seen_by(layer, i, j, first, part))
            y[i, rows, j * part.shape[1] : (j + 1) * part.shape[1]] = out.reshape(part.shape)
    return y, layer
