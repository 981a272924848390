"""Norm and positions of attention on Metal: one launch from the projection to a cache's rows."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from attention_cases import Projection, check_queries
from simt import metal

from hadamoe import metal_plan, mlx_gpu_kv
from hadamoe.kv import KVFormat

pytestmark = pytest.mark.skipif(metal.missing() is not None, reason=str(metal.missing()))

VARIANTS = list(metal.variants())
#: (batch, tokens, query heads, key heads, columns, turned columns)
SHAPES = [(1, 1, 4, 2, 64, 16), (2, 5, 3, 1, 32, 32), (1, 3, 16, 2, 256, 64), (1, 2, 2, 2, 512, 96)]


class Case(Projection):
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
        super().check(np.array(out.q), *np.array(out.kv))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_meaning(shape):
    Case(*shape).check(check=True)
    Case(*shape, stretch=1.1386).check()


def test_every_variant():
    for options in VARIANTS:
        Case(*SHAPES[0]).check(**options)


@pytest.mark.parametrize("codec", ["h2", "h8", "turbo4", "fp8"])
def test_queries_of_coded_pages(codec):
    out = Case(*SHAPES[0]).run(KVFormat(codec, codec), check=True)
    check_queries(codec, *map(np.array, (out.q, out.x, out.factors)))


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
