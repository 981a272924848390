"""Norm and positions of attention on Metal: one launch from the projection to a cache's rows."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from simt import metal

from hadamoe import kv_ops, metal_plan, mlx_gpu_kv
from hadamoe.kv import KVFormat

pytestmark = pytest.mark.skipif(metal.missing() is not None, reason=str(metal.missing()))

VARIANTS = list(metal.variants())
#: (batch, tokens, query heads, key heads, columns, turned columns)
SHAPES = [(1, 1, 4, 2, 64, 16), (2, 5, 3, 1, 32, 32), (1, 3, 16, 2, 256, 64), (1, 2, 2, 2, 512, 96)]


class Case:
    """Random projections and what they should become, in f64."""

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

    def run(self, form=None, dtypes=(mx.float32, mx.float32), **options):
        *_, h, g, d = self.shape
        with metal.installed(**options) as log:
            out = mlx_gpu_kv.prepare(
                mx.array(self.proj), (h, g), d, tuple(map(mx.array, self.norms)),
                mx.array(self.freqs), mx.array(self.offset), stretch=self.stretch, form=form,
                q_dtype=dtypes[0], kv_dtype=dtypes[1],
            )  # fmt: skip
        assert len(log) == 1
        assert log[0].threadgroup_bytes <= 16384
        return out

    def check(self, **options):
        out = self.run(**options)
        # a norm, two products and their sum, cosines within 4 units of the last place
        assert np.abs(np.array(out.q) - self.q).max() <= 3e-6 * np.abs(self.q).max()
        keys, values = np.array(out.kv)
        assert np.abs(keys - self.kv[0]).max() <= 3e-6 * np.abs(self.kv[0]).max()
        np.testing.assert_array_equal(values, np.float32(self.kv[1]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_meaning(shape):
    Case(*shape).check(check=True)
    Case(*shape, stretch=1.1386).check()


def test_every_variant():
    for options in VARIANTS:
        Case(*SHAPES[0]).check(**options)


@pytest.mark.parametrize("codec", ["h2", "h8", "turbo4", "fp8"])
def test_queries_of_coded_pages(codec):
    """Whole numbers of our codecs are the CPU's; other queries are turned as keys are."""
    case = Case(*SHAPES[0])
    out = case.run(KVFormat(codec, codec), check=True)
    q, x = np.array(out.q), np.array(out.x)
    d = case.shape[-1]
    if codec[0] == "h":
        pages = kv_ops.kv_encode(np.zeros((1, 64, d), np.float32), codec)
        q8, unit, _ = kv_ops.kv_scores(q.reshape(-1, d), pages, codec)
        np.testing.assert_array_equal(x.reshape(-1, d), q8)
        worth = {"h2": 1 / 59.59375 / d, "h8": d**-0.5}[codec]
        np.testing.assert_allclose(np.array(out.factors).reshape(-1), unit * worth, rtol=1e-6)
    else:
        lengths = [np.linalg.norm(a.astype(np.float64), axis=-1) for a in (q, x)]
        np.testing.assert_allclose(*lengths, rtol=1e-6)
        assert np.array_equal(q, x) == (codec == "fp8")
        np.testing.assert_allclose(out.factors, d**-0.5, rtol=1e-6)


def test_dtypes_of_a_cache():
    case = Case(*SHAPES[0])
    plain, out = case.run(), case.run(dtypes=(mx.bfloat16, mx.bfloat16))
    for wide, narrow in ((plain.q, out.q), (plain.kv, out.kv)):
        np.testing.assert_array_equal(
            narrow.astype(mx.float32), wide.astype(mx.bfloat16).astype(mx.float32)
        )


def test_a_position_off_by_one_is_seen():
    case = Case(*SHAPES[0])
    case.offset = case.offset + 1
    with pytest.raises(AssertionError):
        case.check()


def test_text_is_small():
    assert len(metal_plan.source("attention")) < 8192
