"""What f32 arithmetic may lose of attention over quantized pages; the integers in it lose nothing.

Codes, integer scores and integer sums of weights are exact. What rounds: a score's scale and shift,
the softmax, weights to 14 bits of their page's largest, f32 sums in any order, the rotation back.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .. import reference_kv as meaning
from ..kv import PAGE
from ..kv_ops import KVLayer
from .claims import gamma
from .rounding import TINY, Rounded, U

#: The largest weight of a page: two digits of 7 bits.
MOST = 16383
#: Pages that share a maximum.
RUN = 8


class _Lost(NamedTuple):
    """How far off scores may be ``[n, tokens]``; ``common``: all coded ones of a query alike."""

    raw: np.ndarray
    coded: np.ndarray
    common: np.ndarray


def _score_errors(layer, i: int, j: int, first: int, q: np.ndarray, seen) -> _Lost:
    d, page, codec = q.shape[-1], first // PAGE, layer.format[0]
    flat = np.abs(q.reshape(-1, d).astype(np.float64)) / np.sqrt(d)
    slots = [0, meaning.slot_of(page)] if page else [0]
    keys = meaning.widen(layer.raw_keys[i, j, slots]).reshape(-1, d)[: seen.raw_scores.shape[1]]
    raw = gamma(d + 4) * (flat @ np.abs(keys.T.astype(np.float64)))
    means = np.zeros(d) if layer.vectors is None else np.abs(layer.vectors[0, j])
    shift = (flat @ means)[:, None]
    if meaning.bits_of(codec):
        coded = gamma(8) * (np.abs(seen.coded_scores) + shift)
    else:  # rows are decoded, some rotated back, in f32
        stored = meaning.pages_seen(layer, i, j, page)[0]
        scale = 1.0 if layer.scales is None else layer.scales[0]
        rows = meaning.kv_decode(stored, codec, d, scale=scale).reshape(-1, d).astype(np.float64)
        lengths = np.linalg.norm(flat, axis=1)[:, None] * np.linalg.norm(rows, axis=1)
        coded = gamma(d + 40) * lengths
    return _Lost(raw, coded, gamma(d + 4) * shift)


def _weights(seen, lost: _Lost) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Relative errors: of each token's share, raw and coded; of coded ones beside their page's."""
    scores = np.concatenate([seen.raw_scores, seen.coded_scores], 1)
    spread = scores.max(1) - np.where(np.isfinite(scores), scores, np.inf).min(1)
    each = ((spread + 8) * U)[:, None]
    joins = 4 + scores.shape[1] // (RUN * PAGE)
    errors = np.concatenate([lost.raw, lost.coded + lost.common], 1)
    off = np.expm1(errors + joins * each) + gamma(scores.shape[1] + 16)
    off = off + (np.concatenate(meaning.softmax(seen), 1) * off).sum(1, keepdims=True)
    return *np.split(off, [seen.raw_scores.shape[1]], 1), np.expm1(lost.coded + each)


def _digits(seen, coded: np.ndarray, off: np.ndarray, beside: np.ndarray):
    """Shares as 14 bits of p * nu, and their error: a unit where rounding could go either way."""
    w = (coded * seen.nu).reshape(len(coded), -1, PAGE)
    beside = beside.max(1, initial=0)[:, None, None] + 4 * U
    unit = np.maximum(w.max(-1, keepdims=True), TINY) / MOST
    half = w / unit + 0.5
    near = np.abs(half - np.rint(half)) <= 2 * beside * half
    levels = np.minimum(np.floor(half), MOST)
    nu = np.where(seen.nu > 0, seen.nu, np.inf)
    wrong = levels * unit * (off.max(1, initial=0)[:, None, None] + 8 * U) + near * unit
    return tuple(x.reshape(coded.shape) / nu for x in (levels * unit, wrong))


def _integer_part(layer, seen, coded, off, beside) -> tuple[np.ndarray, np.ndarray]:
    """The rotated sum of stored values ``[n, d]`` and the norm of its error ``[n]``, corrected."""
    bits = meaning.bits_of(layer.format[1])
    rounded, wrong = _digits(seen, coded, off, beside)
    part, sizes = rounded @ seen.coded_values, np.abs(seen.coded_values)
    wrong = wrong + gamma(rounded.shape[1] // PAGE + 16) * rounded
    lost = np.linalg.norm(wrong @ sizes, axis=1)
    length, d = np.linalg.norm(part, axis=1), part.shape[1]
    noise = meaning.ERRORS[bits] * (1 - meaning.ERRORS[bits]) * (coded**2 @ seen.nu**2)
    worse = noise * (2 * off.max(1, initial=0) + gamma(40))
    # o (1 - N / |o|^2), 0 where negative, moves with o by up to 2, with N by up to 1 / |o|
    lost = 2 * lost + worse / np.maximum(np.maximum(length, np.sqrt(noise)), TINY)
    return part, lost + gamma(d + 32) * length


def head(layer, i: int, j: int, first: int, q: np.ndarray) -> Rounded:
    """`reference_kv.combine` of queries ``[n, r, d]`` of one page, weights rounded, its error."""
    seen, d = meaning.seen_by(layer, i, j, first, q), q.shape[-1]
    raw, coded = meaning.softmax(seen)
    raw_off, off, beside = _weights(seen, _score_errors(layer, i, j, first, q, seen))
    mean, balance = np.zeros(d), np.ones(d)
    if layer.vectors is not None:
        mean, balance = np.abs(layer.vectors[2:, j].astype(np.float64))
    if meaning.bits_of(layer.format[1]):
        part, lost = _integer_part(layer, seen, coded, off, beside)
    else:  # some are rotated back at the end
        part = coded @ seen.coded_values
        lost = np.linalg.norm((coded * off) @ np.abs(seen.coded_values), axis=1)
        lost = lost + gamma(d + 40) * (coded @ np.linalg.norm(seen.coded_values, axis=1))
    y = meaning.join(layer, j, seen, raw, coded, part)
    error = (raw * raw_off) @ np.abs(seen.raw_values) + lost[:, None] / balance
    error = error + (coded * (off + gamma(8))).sum(1, keepdims=True) * mean
    return Rounded(y, error + 4 * U * (np.abs(y) + mean) + TINY)


def kv_attend(q, k, v, layer, lengths, counts=None) -> tuple[Rounded, KVLayer]:
    """y of `reference_kv.kv_attend`, weights rounded, its bound in f32, and the layer after it."""
    layer = meaning.copied(layer)
    y, error, groups = np.zeros(q.shape), np.zeros(q.shape), layer.raw_keys.shape[1]
    for i, rows, first in meaning.walk(q, k, v, layer, lengths, counts):
        for j, part in enumerate(np.split(meaning.widen(q[i, rows]), groups, 1)):
            heads = slice(j * part.shape[1], (j + 1) * part.shape[1])
            one = head(layer, i, j, first, part)
            y[i, rows, heads] = one.value.reshape(part.shape)
            error[i, rows, heads] = one.error.reshape(part.shape)
    return Rounded(y, error), layer
