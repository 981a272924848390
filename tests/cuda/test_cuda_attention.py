"""Norm and positions of attention on CUDA: one launch from the projection to a cache's rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_cases import to_torch
from kv_cases_cuda import name_of, signs_of
from simt import cuda, cuda_launch

from hadamoe import cuda_kv, kv_ops
from hadamoe.kv import PAGE, KVFormat

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))

#: (batch, tokens, query heads, key heads, columns, turned columns)
SHAPES = [(1, 1, 4, 2, 64, 16), (2, 5, 3, 1, 64, 64), (1, 3, 16, 2, 256, 64), (1, 2, 2, 2, 128, 96)]


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

    def run(self, form=None, kv_dtype=torch.float32, dtype=torch.float32, placed=False, **options):
        b, t, h, g, d = self.shape
        heads = cuda_kv.Heads(b, h, g, d, form)
        launch = cuda_kv.prepare(
            heads, t, 2 * len(self.freqs), name_of(kv_dtype), eps=1e-6, stretch=self.stretch,
            placed=placed, dtype=name_of(dtype),
        )  # fmt: skip
        arrays = dict(zip(("q_norm", "k_norm"), map(to_torch, self.norms), strict=True))
        arrays |= {"proj": to_torch(self.proj).to(dtype), "freqs": to_torch(self.freqs)}
        arrays |= {"offsets": to_torch(self.offset), "signs": signs_of("key", d)}
        with cuda.installed(**options):
            return cuda_launch.run(launch, arrays)

    def check(self, **options):
        q, kv, *_ = self.run(**options)
        # a norm, two products and their sum, cosines within 4 units of the last place
        assert np.abs(q.numpy() - self.q).max() <= 3e-6 * np.abs(self.q).max()
        keys, values = kv.numpy()
        assert np.abs(keys - self.kv[0]).max() <= 3e-6 * np.abs(self.kv[0]).max()
        np.testing.assert_array_equal(values, np.float32(self.kv[1]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_meaning(shape):
    Case(*shape).check(check=True)
    Case(*shape, stretch=1.1386).check(contract=False)


@pytest.mark.parametrize("codec", ["h2", "h8", "turbo4", "fp8"])
def test_queries_of_coded_pages(codec):
    """Whole numbers of our codecs are the CPU's; other queries are turned as keys are."""
    case = Case(*SHAPES[0])
    q, _, x, factors = (a.numpy() for a in case.run(KVFormat(codec, codec), check=True))
    d = case.shape[-1]
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


def test_dtypes():
    """Of a cache; of a projection, whose numbers are widened first."""
    case = Case(*SHAPES[0])
    wide, narrow = case.run()[1], case.run(kv_dtype=torch.bfloat16)[1]
    assert torch.equal(narrow, wide.to(torch.bfloat16))
    got = case.run(dtype=torch.bfloat16)
    case.proj = to_torch(case.proj).to(torch.bfloat16).float().numpy()
    for a, b in zip(got[:2], case.run()[:2], strict=True):
        assert torch.equal(a, b)


def test_rows_of_a_cache():
    """Keys and values where positions say: page 0, then pages in turn; the bits of a prompt's."""
    case = Case(3, 1, 2, 2, 64, 16)
    case.offset = np.int32([5, 64 + 7, 128])
    _, kv, *_ = case.run()
    _, raw, *_ = case.run(placed=True)
    for b, row in enumerate((5, 128 + 7, 64)):
        assert torch.equal(raw[:, b, :, row], kv[:, b, :, 0])
    assert raw.isfinite().sum() == kv.numel()  # nothing else is written


def test_a_position_off_by_one_is_seen():
    case = Case(*SHAPES[0])
    case.offset = case.offset + 1
    with pytest.raises(AssertionError):
        case.check()
