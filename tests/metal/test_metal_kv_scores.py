"""Integer scores on Metal are the CPU's integers: the claim that holds backends to each other."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from page_cases import case, largest, one_code_changed
from simt import metal

from hadamoe import kv_ops, metal_plan, mlx_gpu_kv
from hadamoe.verify import kv_cases

pytestmark = pytest.mark.skipif(metal.missing() is not None, reason=str(metal.missing()))

VARIANTS = list(metal.variants())


def same_integers(q: np.ndarray, pages: np.ndarray, codec: str, **options):
    """Holds q8, units and scores to the CPU's bits; returns the launch."""
    want = kv_ops.kv_scores(q, pages, codec)
    with metal.installed(**options) as log:
        got = mlx_gpu_kv.kv_scores(mx.array(q), mx.array(pages), codec)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    return log[0]


@pytest.mark.parametrize("kind", kv_cases.ROWS)
@pytest.mark.parametrize("codec", kv_cases.OURS)
def test_integers_of_the_cpu(codec, kind):
    """More pages than a group has, rows that fill no group; races and bounds are looked for."""
    same_integers(*case(codec, 64, 11, 9, kind), codec, check=True)
    same_integers(*case(codec, 256, 8, 3, kind), codec)


@pytest.mark.parametrize("d", [32, 128, 512])
@pytest.mark.parametrize("codec", kv_cases.OURS)
def test_other_widths(codec, d):
    same_integers(*case(codec, d, 5, 2), codec)


@pytest.mark.parametrize("codec", kv_cases.OURS)
def test_every_variant(codec):
    for options in VARIANTS:
        same_integers(*case(codec, 64, 8, 2), codec, **options)


@pytest.mark.parametrize("codec", kv_cases.OURS)
def test_the_largest_integers(codec):
    """Every product as large as it can be, of one sign: still below 2^24 at 512 columns."""
    same_integers(*largest(codec, 512), codec)


@pytest.mark.parametrize("codec", kv_cases.OURS)
def test_codes_are_read_once_for_eight_queries(codec):
    q, pages = case(codec, 256, 8, 16)
    launch = same_integers(q, pages, codec, check=True)
    codes = pages.nbytes - 16 * 128  # scales are not asked for
    assert launch.traffic["pages"].read == codes


def test_a_wrong_level_is_seen():
    """The claim can fail: a page with one code changed has other integers."""
    q, pages, other = one_code_changed()
    with metal.installed():
        got = mlx_gpu_kv.kv_scores(mx.array(q), mx.array(other), "h4")[2]
    assert (np.array(got) != kv_ops.kv_scores(q, pages, "h4")[2]).any()


def test_text_is_small():
    assert len(metal_plan.source("kv_scores")) < 8192
