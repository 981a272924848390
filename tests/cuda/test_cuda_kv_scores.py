"""Integer scores on CUDA are the CPU's integers: the claim that holds backends to each other."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_cases import to_torch
from kv_cases_cuda import signs_of
from page_cases import case, largest, one_code_changed
from simt import cuda, cuda_launch

from hadamoe import cuda_kv, kv_ops
from hadamoe.verify import kv_cases

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))


def scores(q: np.ndarray, pages: np.ndarray, codec: str, **options):
    """(q8, unit, scores), the launch."""
    launch = cuda_kv.scores(len(q), len(pages), codec, q.shape[1])
    arrays = {"q": to_torch(q), "pages": to_torch(pages), "signs": signs_of("key", q.shape[1])}
    with cuda.installed(**options) as log:
        return [a.numpy() for a in cuda_launch.run(launch, arrays)], log[0]


def same_integers(q: np.ndarray, pages: np.ndarray, codec: str, **options):
    """Holds q8, units and scores to the CPU's bits; returns the launch."""
    got, launch = scores(q, pages, codec, **options)
    for a, b in zip(got, kv_ops.kv_scores(q, pages, codec), strict=True):
        np.testing.assert_array_equal(a, b)
    return launch


@pytest.mark.parametrize("kind", kv_cases.ROWS)
@pytest.mark.parametrize("codec", kv_cases.OURS)
def test_integers_of_the_cpu(codec, kind):
    """Rows that fill no group of eight; races and bounds are looked for."""
    same_integers(*case(codec, 32, 11, 3, kind), codec, check=True)
    same_integers(*case(codec, 64, 11, 3, kind), codec, check=True)
    same_integers(*case(codec, 128, 5, 2, kind), codec)
    same_integers(*case(codec, 256, 8, 3, kind), codec)


@pytest.mark.parametrize("options", [{"contract": False}, {"schedule": "random", "seed": 7}])
@pytest.mark.parametrize("codec", kv_cases.OURS)
def test_no_freedom_of_a_compiler_changes_a_bit(codec, options):
    same_integers(*case(codec, 64, 8, 2), codec, **options)


@pytest.mark.parametrize("codec", kv_cases.OURS)
def test_the_largest_integers(codec):
    """Every product as large as it can be, of one sign."""
    same_integers(*largest(codec, 256), codec)


@pytest.mark.parametrize("codec", kv_cases.OURS)
def test_codes_are_read_once_for_eight_queries(codec):
    """But for the third bits of h3, which two lanes share."""
    q, pages = case(codec, 256, 8, 4)
    traffic = same_integers(q, pages, codec, check=True).traffic["pages"]
    codes = pages.nbytes - 4 * 128  # scales are not asked for
    assert traffic.unique_read == codes
    assert traffic.read == codes * (4 if codec == "h3" else 3) // 3


def test_a_wrong_level_is_seen():
    """The claim can fail: a page with one code changed has other integers."""
    q, pages, other = one_code_changed()
    assert (scores(q, other, "h4")[0][2] != kv_ops.kv_scores(q, pages, "h4")[2]).any()
