"""What is between the projections of attention and its cache, for the kernels of every GPU."""

from __future__ import annotations

import numpy as np

from hadamoe import kv_ops
from hadamoe.kv import PAGE


class Projection:
    """Random projections and what they should become, in f64. A test brings `run`."""

    def __init__(self, b, t, h, g, d, rot, stretch=1.0):
        rng = np.random.default_rng([b, t, h, g, d, rot])
        self.shape = b, t, h, g, d
        self.proj = rng.standard_normal((b, t, (2 * h + 2 * g) * d)).astype(np.float32)
        self.norms = [rng.uniform(0.5, 1.5, d).astype(np.float32) for _ in range(2)]
        self.freqs = np.float32(1e4 ** -(np.arange(rot // 2) / (rot // 2)))
        self.offset = rng.integers(0, 3000, b).astype(np.int32)
        self.stretch = stretch
        heads = self.proj.reshape(b, t, 2 * h + 2 * g, d).swapaxes(1, 2).astype(np.float64)
        self.q = self.turned(heads[:, : 2 * h : 2], self.norms[0])
        self.kv = [self.turned(heads[:, 2 * h : 2 * h + g], self.norms[1]), heads[:, 2 * h + g :]]

    def turned(self, x, norm):
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * norm
        half = len(self.freqs)
        position = self.offset[:, None, None] + np.arange(x.shape[2])
        angle = np.float32(position[..., None].astype(np.float32) * self.freqs).astype(np.float64)
        cos, sin = np.cos(angle) * self.stretch, np.sin(angle) * self.stretch
        a, b = x[..., :half], x[..., half : 2 * half]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], -1)

    def check(self, q, keys, values):
        # a norm, two products and their sum, cosines within 4 units of the last place
        assert np.abs(q - self.q).max() <= 3e-6 * np.abs(self.q).max()
        assert np.abs(keys - self.kv[0]).max() <= 3e-6 * np.abs(self.kv[0]).max()
        np.testing.assert_array_equal(values, np.float32(self.kv[1]))


def check_queries(codec, q, x, factors):
    """Whole numbers of our codecs are the CPU's; other queries are turned as keys are."""
    d = q.shape[-1]
    if codec[0] == "h":
        pages = kv_ops.kv_encode(np.zeros((1, PAGE, d), np.float32), codec)
        q8, unit, _ = kv_ops.kv_scores(q.reshape(-1, d), pages, codec)
        np.testing.assert_array_equal(x.reshape(-1, d), q8)
        worth = {"h2": 1 / 59.59375 / d, "h8": d**-0.5}[codec]
        np.testing.assert_allclose(factors.reshape(-1), unit * worth, rtol=1e-6)
    else:
        lengths = [np.linalg.norm(a.astype(np.float64), axis=-1) for a in (q, x)]
        np.testing.assert_allclose(*lengths, rtol=1e-6)
        assert np.array_equal(q, x) == (codec == "fp8")
        np.testing.assert_allclose(factors, d**-0.5, rtol=1e-6)
