"""What each op means, in numpy. Slow, short, and what the tests compare every kernel with.

`hadamard` and `dequantize` repeat the kernels' f32 arithmetic bit for bit. `qmatmul`,
the rest work in f64: the numbers the f32 kernels approximate.
"""

from __future__ import annotations

import numpy as np

from .weight import Part, Weight

#: E2M1 numbers (OCP Microscaling Formats 1.0, section 5.3.3) in code order.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def hadamard(x, *, block: int = 0, pre=None, post=None) -> np.ndarray:
    """post * H(pre * x) along the last axis, in blocks, f32 (bit-exact meaning of the op).

    H is the orthonormal Walsh-Hadamard transform in natural (Sylvester) order. ``block`` > 0: x is
    zero-padded to a multiple of it, and each sum divided by f32(sqrt(block)) (TQ's rounding).
    ``block`` = 0: k is cut into its powers of two, largest first, and each sum multiplied by
    f32(1 / sqrt(size)) (JANGTQ's and MLX's).
    """
    x = np.asarray(x).astype(np.float32)
    k = x.shape[-1]
    y = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -k % block if block else 0)])
    k = y.shape[-1]
    y = y if pre is None else y * np.tile(pre, k // len(pre))
    sizes = [block] * (k // block) if block else [1 << i for i in range(14, -1, -1) if k >> i & 1]
    for size, end in zip(sizes, np.cumsum(sizes), strict=True):
        part, h = y[..., end - size : end], 1
        while h < size:
            a, b = np.moveaxis(part.reshape(*part.shape[:-1], -1, 2, h), -2, 0)
            part, h = np.stack([a + b, a - b], -2).reshape(part.shape), 2 * h
        root = np.sqrt(np.float64(size))
        y[..., end - size : end] = part / np.float32(root) if block else part * np.float32(1 / root)
    return y if post is None else y * np.tile(post, k // len(post))


def widen(array: np.ndarray, scale: str) -> np.ndarray:
    """Stored numbers as f32: ``scale`` names the storage (f32, f16, bf16, e8m0), exactly."""
    if scale == "bf16":
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if scale == "e8m0":
        power = np.exp2(array.astype(np.float64) - 127)
        return np.where(array == 255, np.nan, power).astype(np.float32)
    return array.view({"f16": np.float16, "f32": np.float32}[scale]).astype(np.float32)


def part_values(part: Part, columns: int) -> np.ndarray:
    """f32 [rows, columns]: scale * table[code] + bias, product and sum each rounded to f32."""
    table, bits, scale = part.instance
    codes = np.ascontiguousarray(part.codes)
    if table == "plain":
        return widen(codes[:, : columns * bits // 8].copy(), scale)
    if table == "e2m1_gguf":  # blocks of 32: one E8M0; codes 0..15 in low nibbles, 16..31 in high
        block = codes[:, : columns // 32 * 17].reshape(part.rows, -1, 17)
        halves = [block[..., 1:] & 15, block[..., 1:] >> 4]
        code = np.concatenate(halves, -1).reshape(part.rows, columns)
        scales = widen(block[..., 0], "e8m0")
    else:
        stream = np.unpackbits(codes, axis=1, bitorder="little")[:, : columns * bits]
        code = stream.reshape(part.rows, columns, bits) @ (1 << np.arange(bits))
        scales = widen(part.scale, scale)
    count = np.arange(1 << bits)
    tables = {"linear": count, "linear_signed": count - len(count) // 2, "codebook": part.codebook}
    values = tables.get(table, E2M1)
    group = np.arange(columns) // part.group
    with np.errstate(all="ignore"):
        product = scales[:, group] * values.astype(np.float32)[code]
        return product if part.bias is None else product + widen(part.bias, scale)[:, group]


def dequantize(weight: Weight, rows) -> np.ndarray:
    """f32 [m, columns]: rows by flat index e * weight.rows + n, as stored (rotation not undone)."""
    flat = [part_values(p, weight.columns) for expert in weight.parts for p in expert]
    return np.concatenate(flat)[np.asarray(rows)]


def qmatmul(x, weight: Weight, expert=None) -> np.ndarray:
    """y = x @ W^T in f64: f64 [..., n], or [..., a, n] through the experts of int [..., a].

    y[t, n] = sum_k x[t, k] * (scale[n, g] * table[code[n, k]] + bias[n, g]), g = k // group, for
    x [..., k] that is rotated already. f32 kernels approximate it; on integers they meet it.
    """
    w = dequantize(weight, np.arange(weight.experts * weight.rows)).astype(np.float64)
    x = np.asarray(x, np.float64)
    if expert is None:
        return x @ w.T
    w = w.reshape(weight.experts, weight.rows, weight.columns)
    return np.einsum("...k,...ank->...an", x, w[np.asarray(expert)])


def qmatmul_top(x, weight: Weight, top: int, *, norm=None, eps=1e-6):
    """(values f64 [..., top], index [..., top]) of the largest y = rotate(rms_norm(x)) @ W^T."""
    y = _through(x if norm is None else rms_norm(x, norm, eps), weight)
    index = np.argsort(-y, -1, kind="stable")[..., :top]
    return np.take_along_axis(y, index, -1), index


def moe_decode(x, moe: dict[str, Weight], *, top_k: int, normalize: bool = True):
    """(y [t, k], expert [t, top_k], weight [t, top_k]) of x [t, k] in f64; ``moe`` by role.

    p = softmax(router(x)) and its top_k largest, the lower index first among equals; y = sum_k p_k
    down_k(silu(gate_k(x)) * up_k(x)) + sigmoid(shared_gate(x)) * shared(x). Every weight's input
    goes through its own rotation first, in f32. transformers' Qwen3_5MoeSparseMoeBlock.
    """

    def product(x, role, expert=None):
        r = moe[role].rotation
        x = x if r is None else hadamard(x, block=r.block or 0, pre=r.pre, post=r.post)
        return qmatmul(x, moe[role], expert)

    def swiglu(gate_up):
        gate, up = np.split(gate_up, 2, -1)
        return gate * sigmoid(gate) * up

    sigmoid = lambda u: np.exp(-np.logaddexp(0, -u))  # noqa: E731
    logits = product(x, "router")
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    expert = np.argsort(-p, -1, kind="stable")[:, :top_k]
    weight = np.take_along_axis(p, expert, -1)
    weight = weight / weight.sum(-1, keepdims=True) if normalize else weight
    inner = swiglu(product(x, "gate_up", expert))
    each = [product(inner[:, i], "down", expert[:, i : i + 1]) for i in range(top_k)]
    y = (weight[..., None] * np.concatenate(each, 1)).sum(1)
    shared = product(swiglu(product(x, "shared_gate_up")), "shared_down")
    return y + sigmoid(product(x, "shared_gate")) * shared, expert, weight


def gated_delta(
    proj, conv_weight, a_log, dt_bias, norm, conv_state, state, *, hk: int, eps: float, counts=None
):
    """(y, conv_state, state) after the tokens of proj [b, t, qkv | z | b | a], in f64.

    Causal conv1d and SiLU on q, k, v; q and k normalised; S = e^g S + k (beta (v - (e^g S)^T k))^T;
    y = norm * rms(S^T q) * silu(z). conv_state f[b, c, kernel] ends with the newest input; state is
    S f[b, hv, dk, dv]. Yang, Kautz, Hatamizadeh 2024 (arXiv 2412.06464), equation 10. With counts
    [b], tokens of a sequence from its count on have y = 0 and leave its states as they are.
    """
    proj, w, s, conv = (np.asarray(a, np.float64) for a in (proj, conv_weight, state, conv_state))
    (b, t, _), (c, _), (_, hv, dk, dv) = proj.shape, w.shape, s.shape
    qkv, z, beta, a = np.split(proj, np.cumsum([c, hv * dv, hv]), axis=-1)
    sigmoid = lambda u: 1 / (1 + np.exp(-u))  # noqa: E731
    beta, decay = sigmoid(beta), np.exp(-np.exp(np.float64(a_log)) * np.logaddexp(0, a + dt_bias))
    y = np.empty((b, t, hv, dv))
    for i in range(t):
        there = np.full(b, True) if counts is None else i < np.asarray(counts)
        before = conv, s
        conv = np.concatenate([conv[..., 1:], qkv[:, i, :, None]], -1)
        x = (conv * w).sum(-1)
        q, k, v = np.split(x * sigmoid(x), [hk * dk, 2 * hk * dk], axis=-1)
        q, k = (np.repeat(u.reshape(b, hk, dk, 1), hv // hk, 1) for u in (q, k))
        q, k = (u / np.sqrt((u * u).sum(2, keepdims=True) + 1e-6) for u in (q, k))
        s = s * decay[:, i, :, None, None]
        error = v.reshape(b, hv, 1, dv) - (s * k).sum(2, keepdims=True)
        s = s + k * (beta[:, i, :, None, None] * error)
        o = (s * q).sum(2) / np.sqrt(dk)
        gate = z[:, i].reshape(b, hv, dv)
        y[:, i] = norm * o / np.sqrt((o * o).mean(-1, keepdims=True) + eps) * gate * sigmoid(gate)
        y[~there, i] = 0
        conv, s = (np.where(there.reshape(b, *[1] * (new.ndim - 1)), new, old)
                   for new, old in zip((conv, s), before, strict=True))  # fmt: skip
    return y.reshape(b, t, hv * dv), conv, s


def attention(proj, q_norm, k_norm, cos, sin, keys, values, *, heads, past=0, mask=None, eps=1e-6):
    """(y, keys, values) with the tokens of proj [b, t, (q | gate) per head | k | v] cached, in f64.

    q and k through RMSNorm and the first r dimensions' rotation by cos, sin [b, t, r]; softmax of
    q k^T / sqrt(d) over the keys a query sees (all up to its own, or mask [b, t, n]); y is that
    mean of values times sigmoid(gate), 0 where a query sees none. transformers' attention.
    """
    arrays = (proj, q_norm, k_norm, cos, sin, keys, values)
    proj, q_norm, k_norm, cos, sin, keys, values = (np.array(a, np.float64) for a in arrays)
    (b, t, _), (_, g, _, d), r = proj.shape, keys.shape, cos.shape[-1]
    q, k, v = np.split(proj, [2 * heads * d, (2 * heads + g) * d], -1)
    q, gate = np.split(q.reshape(b, t, heads, 2 * d), 2, -1)
    k, v = (u.reshape(b, t, g, d) for u in (k, v))

    def turned(u):
        low, high = u[..., : r // 2], u[..., r // 2 : r]
        half = np.concatenate([-high, low], -1)
        both = u[..., :r] * cos[:, :, None] + half * sin[:, :, None]
        return np.concatenate([both, u[..., r:]], -1)

    q, k = turned(rms_norm(q, q_norm, eps)), turned(rms_norm(k, k_norm, eps))
    keys[:, :, past : past + t], values[:, :, past : past + t] = k.swapaxes(1, 2), v.swapaxes(1, 2)
    n = past + t
    every = (np.repeat(u[:, :, :n], heads // g, 1) for u in (keys, values))
    seen = np.arange(n) <= past + np.arange(t)[:, None] if mask is None else mask[:, None, :, :n]
    every_key, every_value = every
    scores = np.einsum("bthd,bhnd->bhtn", q, every_key) / np.sqrt(d)
    scores = np.where(seen, scores, -np.inf)
    weight = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e300))
    total = weight.sum(-1, keepdims=True)
    mean = np.einsum("bhtn,bhnd->bthd", weight / np.where(total == 0, 1, total), every_value)
    return (mean / (1 + np.exp(-gate))).reshape(b, t, heads * d), keys, values


def rms_norm(x, gamma, eps):
    """x / sqrt(mean(x^2) + eps) * gamma along the last axis, in f64."""
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gamma


def _through(x, weight: Weight):
    """x through the weight's rotation (in f32) and the weight."""
    r = weight.rotation
    x = x if r is None else hadamard(x, block=r.block or 0, pre=r.pre, post=r.post)
    return qmatmul(x, weight)


def attention_block(x, norm, weights, *vectors, heads, past=0, mask=None, eps=1e-6):
    """(x + o(attention(q, k, v of rms_norm(x))), keys, values) in f64; weights by role."""
    normed = rms_norm(x, norm, eps)
    proj = np.concatenate([_through(normed, weights[role]) for role in "qkv"], -1)
    y, *caches = attention(proj, *vectors, heads=heads, past=past, mask=mask, eps=eps)
    return x + _through(y, weights["o"]), *caches


def gated_delta_block(x, norm, weights, *vectors, hk, mask=None, eps=1e-6):
    """(x + out(gated_delta(qkv, z, b, a of rms_norm(x))), conv_state, state); weights by role.

    A masked token's rms_norm(x) is 0; those behind the last unmasked one leave the states alone.
    """
    normed = rms_norm(x, norm, eps) * (1 if mask is None else mask[..., None])
    proj = np.concatenate([_through(normed, weights[role]) for role in ("qkv", "z", "b", "a")], -1)
    ends = None if mask is None else np.where(mask, np.arange(1, mask.shape[1] + 1), 0).max(1)
    y, *states = gated_delta(proj, *vectors, hk=hk, eps=eps, counts=ends)
    return x + _through(y, weights["out"]), *states


def moe_block(x, norm, moe, *, top_k, normalize=True, eps=1e-6):
    """x + moe_decode(rms_norm(x)) of x [t, k] in f64."""
    return x + moe_decode(rms_norm(x, norm, eps), moe, top_k=top_k, normalize=normalize)[0]
