"""Running error analysis: what f32 arithmetic may lose, derived operation by operation.

`Rounded` carries a number in f64 and a bound of how far an f32 evaluation of the same expression
may be from it (Higham, Accuracy and Stability of Numerical Algorithms, section 3.3). Sums are
bounded for any order of addition, products with or without fused multiply-add.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Unit roundoff of f32.
U = 2.0**-24
#: Below the normal range a rounding error is absolute.
TINY = 2.0**-126


@dataclass(frozen=True, slots=True)
class Rounded:
    """Arrays: exact ``value``, largest ``|f32 result - value|``."""

    value: np.ndarray
    error: np.ndarray | float = 0.0

    def _rounded(self, value: np.ndarray, error: np.ndarray, units: float = 1) -> Rounded:
        return Rounded(value, error + units * U * (np.abs(value) + error) + TINY)

    def __add__(self, other: Rounded) -> Rounded:
        return self._rounded(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Rounded) -> Rounded:
        return self._rounded(self.value - other.value, self.error + other.error)

    def __mul__(self, other: Rounded) -> Rounded:
        a, b = self, other
        error = np.abs(a.value) * b.error + np.abs(b.value) * a.error + a.error * b.error
        return self._rounded(a.value * b.value, error)

    def __truediv__(self, other: Rounded) -> Rounded:
        least = np.abs(other.value) - other.error
        if not np.all(least > 0):
            raise ZeroDivisionError("Rounded: the divisor may be zero")
        value = self.value / other.value
        return self._rounded(value, (self.error + np.abs(value) * other.error) / least)

    def sum(self, axis: int) -> Rounded:
        """Added up in any order; kept as an axis of one."""
        n = self.value.shape[axis]
        size = (np.abs(self.value) + self.error).sum(axis, keepdims=True)
        error = np.broadcast_to(self.error, self.value.shape).sum(axis, keepdims=True)
        return Rounded(self.value.sum(axis, keepdims=True), error + n * U / (1 - n * U) * size)

    def sqrt(self) -> Rounded:
        value = np.sqrt(self.value)
        return self._rounded(value, value - np.sqrt(np.maximum(self.value - self.error, 0)))

    def exp(self) -> Rounded:
        """2 ulp, hence 4 units, are what exp_ of vec.h and libm's expf promise."""
        value = np.exp(self.value)
        return self._rounded(value, value * np.expm1(self.error), 4)

    def log1p(self) -> Rounded:
        value = np.log1p(self.value)
        return self._rounded(value, self.error / (1 + self.value - self.error), 4)

    def __getitem__(self, key) -> Rounded:
        return Rounded(self.value[key], np.broadcast_to(self.error, self.value.shape)[key])

    def each(self, f) -> Rounded:
        """A rearrangement of numbers, applied to both arrays."""
        return Rounded(f(self.value), f(np.broadcast_to(self.error, self.value.shape)))


def sigmoid(x: Rounded) -> Rounded:
    """1 / (1 + exp(-x))."""
    one = Rounded(np.float64(1))
    return one / (one + Rounded(-x.value, x.error).exp())


def gated_delta(
    proj, conv_weight, a_log, dt_bias, norm, conv_state, state, *, hk: int, eps: float
) -> tuple[Rounded, Rounded]:
    """(y, state) of `reference.gated_delta` with bounds for f32 kernels, storing in f32.

    Mirrors the operations of csrc/cpu/gated_delta.h; inputs are taken as exact.
    """
    arrays = (proj, conv_weight, a_log, dt_bias, norm, conv_state, state)
    p, w, a_log, dt_bias, norm, conv, s = (Rounded(np.asarray(x, np.float64)) for x in arrays)
    (b, t, _), (c, _), (_, hv, dk, dv) = p.value.shape, w.value.shape, s.value.shape
    cut = np.cumsum([c, hv * dv, hv])
    qkv, z, beta, a = (Rounded(x) for x in np.split(p.value, cut, axis=-1))
    a, beta = a + dt_bias, sigmoid(beta)
    grown = Rounded(np.minimum(a.value, 20), a.error).exp().log1p()  # softplus, linear beyond 20
    big = a.value > 20
    softplus = Rounded(
        np.where(big, a.value, grown.value),
        np.where(big, a.error + np.exp(-20), grown.error),  # log1p(e^a) - a < e^-20
    )
    rate = a_log.exp() * softplus
    decay = Rounded(-rate.value, rate.error).exp()
    outputs = []
    for i in range(t):
        window = np.concatenate([conv.value[..., 1:], qkv.value[:, i, :, None]], -1)
        conv = Rounded(window)
        x = (conv * w).sum(-1)[..., 0]
        x = x * sigmoid(x)
        q = x[:, : hk * dk].each(lambda u: np.repeat(u.reshape(b, hk, dk, 1), hv // hk, 1))
        k = x[:, hk * dk : 2 * hk * dk]
        k = k.each(lambda u: np.repeat(u.reshape(b, hk, dk, 1), hv // hk, 1))
        v = x[:, 2 * hk * dk :].each(lambda u: u.reshape(b, hv, 1, dv))
        small, one = Rounded(np.float64(1e-6), 1e-6 * U), Rounded(np.float64(1))
        k = k * (one / ((k * k).sum(2) + small).sqrt())
        root = Rounded(np.float64(dk**-0.5), dk**-0.5 * U)
        q = q * (one / ((q * q).sum(2) + small).sqrt()) * root
        g, rate = (u[:, i].each(lambda n: n[..., None, None]) for u in (decay, beta))
        s_decayed = s * g
        learnt = (v - (s * k).sum(2) * g) * rate
        s = s_decayed + k * learnt
        o = (s * q).sum(2)
        mean = (o * o).sum(3) * Rounded(np.float64(1 / dv), U / dv)
        gate = z[:, i].each(lambda u: u.reshape(b, hv, 1, dv))
        rms = one / (mean + Rounded(np.float64(eps), eps * U)).sqrt()
        outputs.append(norm * (o * rms) * (gate * sigmoid(gate)))
    y = [
        np.stack([np.broadcast_to(getattr(o, part), (b, hv, 1, dv)) for o in outputs], 1)
        for part in ("value", "error")
    ]
    return Rounded(*(u.reshape(b, t, hv * dv) for u in y)), s


def _rms_norm(x: Rounded, gamma: np.ndarray, eps: float) -> Rounded:
    n = x.value.shape[-1]
    mean = (x * x).sum(-1) * Rounded(np.float64(1 / n), U / n)
    root = (mean + Rounded(np.float64(eps), eps * U)).sqrt()
    return x * (Rounded(np.float64(1)) / root) * Rounded(np.asarray(gamma, np.float64))


def _turned(x: Rounded, cos: np.ndarray, sin: np.ndarray) -> Rounded:
    r = cos.shape[-1]
    turn = [Rounded(np.asarray(a, np.float64)[:, :, None]) for a in (cos, sin)]
    half = x[..., :r].each(lambda u: np.concatenate([-u[..., r // 2 :], u[..., : r // 2]], -1))
    half = Rounded(half.value, np.abs(half.error))
    both = x[..., :r] * turn[0] + half * turn[1]
    rest = x[..., r:]
    pairs = ((both.value, rest.value), (both.error, rest.error))
    return Rounded(*(np.concatenate(p, -1) for p in pairs))


def attention(
    proj, q_norm, k_norm, cos, sin, keys, values, *, heads: int, past: int, mask, eps: float
) -> tuple[Rounded, Rounded, Rounded]:
    """(y, keys, values) of `reference.attention` with bounds for f32 kernels and f32 caches.

    Blocks of keys have maxima of their own and are joined in order: every join may add an
    exponential (of a rounded difference), its product and a sum to a weight.
    """
    p = Rounded(np.asarray(proj, np.float64))
    (b, t, _), (_, g, _, d), n = proj.shape, keys.shape, past + proj.shape[1]
    cut = (2 * heads * d, (2 * heads + g) * d)
    both = p[..., : cut[0]].each(lambda u: u.reshape(b, t, heads, 2 * d))
    k, v = (p[..., i:j].each(lambda u: u.reshape(b, t, g, d)) for i, j in (cut, (cut[1], None)))
    root = Rounded(np.float64(d**-0.5), d**-0.5 * U)
    q = _turned(_rms_norm(both[..., :d], q_norm, eps), cos, sin) * root
    k = _turned(_rms_norm(k, k_norm, eps), cos, sin)
    cached = []
    for cache, new in ((keys, k), (values, v)):
        value = np.array(cache, np.float64)
        error = np.zeros_like(value)
        for array, part in (
            (value, new.value),
            (error, np.broadcast_to(new.error, new.value.shape)),
        ):
            array[:, :, past:n] = part.swapaxes(1, 2)
        cached.append(Rounded(value, error))
    every, every_v = (c.each(lambda u: np.repeat(u[:, :, :n], heads // g, 1)) for c in cached)
    q = q.each(lambda u: u.swapaxes(1, 2)[:, :, :, None])
    scores = (q * every[:, :, None]).sum(-1)[..., 0]
    seen = np.arange(n) <= past + np.arange(t)[:, None] if mask is None else mask[:, None, :, :n]
    seen = np.broadcast_to(seen, scores.value.shape)
    least = np.where(seen, scores.value, np.inf).min(-1, keepdims=True)
    most = np.where(seen, scores.value, -np.inf).max(-1, keepdims=True)
    none = ~seen.any(-1, keepdims=True)
    spread = np.where(none, 0, most - least)
    weight = (scores - Rounded(np.where(none, 0, most))).exp()
    joins = -(-n // 128) * (spread + 8) * U
    error = weight.error + joins * (weight.value + weight.error)
    weight = Rounded(np.where(seen, weight.value, 0), np.where(seen, error, 0))
    total = weight.sum(-1).each(lambda u: np.where(none, 1, u))
    mean = (weight.each(lambda u: u[..., None]) * every_v[:, :, None]).sum(3)[:, :, :, 0]
    y = mean * (Rounded(np.float64(1)) / total)
    y = y.each(lambda u: u.swapaxes(1, 2)) * sigmoid(both[..., d:])
    return y.each(lambda u: u.reshape(b, t, heads * d)), *cached
