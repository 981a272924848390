"""Norm and positions of attention on CUDA: one launch from the projection to a cache's rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_cases import Projection, check_queries
from cuda_cases import to_torch
from kv_cases_cuda import name_of, signs_of
from simt import cuda, cuda_launch

from hadamoe import cuda_kv
from hadamoe.kv import KVFormat

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))

#: (batch, tokens, query heads, key heads, columns, turned columns)
SHAPES = [
    (1, 1, 4, 2, 64, 16),
    (2, 3, 4, 2, 32, 16),
    (2, 5, 3, 1, 64, 64),
    (1, 3, 16, 2, 256, 64),
    (1, 2, 2, 2, 128, 96),
]


class Case(Projection):
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
        super().check(q.numpy(), *kv.numpy())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_meaning(shape):
    Case(*shape).check(check=True)
    Case(*shape, stretch=1.1386).check(contract=False)


@pytest.mark.parametrize("codec", ["h2", "h8", "turbo4", "fp8"])
def test_queries_of_coded_pages(codec):
    out = Case(*SHAPES[0]).run(KVFormat(codec, codec), check=True)
    q, _, x, factors = (a.numpy() for a in out)
    check_queries(codec, q, x, factors)


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
