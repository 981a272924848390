"""Pages on CUDA: `kv_encode` and `kv_decode` in the simulator have the CPU kernels' bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kv_cases_cuda import codecs_of, decode, encode
from page_cases import any_codes, rows
from simt import cuda

from hadamoe import cuda_kv, kv_ops
from hadamoe.errors import ContractError, UnsupportedError
from hadamoe.kv import CODECS, PAGE, page_bytes
from hadamoe.verify import kv_cases

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))


def equal_to_the_cpu(codec: str, side: str, d: int, scale: float = 1.0, **options) -> None:
    x = rows(d)
    pages = kv_ops.kv_encode(x, codec, side=side, scale=scale)
    codes = any_codes(pages, codec, d)
    decoded = kv_ops.kv_decode(codes, codec, d, side=side, scale=scale)
    with cuda.installed(**options):
        got = encode(x, codec, side, scale)
        back = decode(codes, codec, side, d, scale).numpy()
    np.testing.assert_array_equal(got, pages)
    np.testing.assert_array_equal(back.view(np.uint32), decoded.view(np.uint32))


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("codec", CODECS)
def test_bits_of_the_cpu(codec, side):
    """Every codec; races, bounds and what nobody wrote are looked for."""
    for d in (32, 64):
        if codec in codecs_of(d):
            equal_to_the_cpu(codec, side, d, check=True)
    equal_to_the_cpu(codec, side, 128)
    equal_to_the_cpu(codec, side, 256)


@pytest.mark.parametrize("options", [{"contract": False}, {"schedule": "random", "seed": 7}])
@pytest.mark.parametrize("codec", ["h3", "h8", "turbo3", "affine4", "kivi2", "fp8"])
def test_no_freedom_of_a_compiler_changes_a_bit(codec, options):
    equal_to_the_cpu(codec, "key", 64, **options)


@pytest.mark.parametrize("scale", [0.5, 0.03])
def test_scales_of_fp8(scale):
    equal_to_the_cpu("fp8", "key", 64, scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("codec", ["bf16", "h4", "turbo2", "kivi4"])
def test_sixteen_bits(codec, dtype):
    """Rows of any float dtype are widened first, numbers are rounded to one last."""
    x = torch.from_numpy(rows(64)[:1]).to(dtype)
    pages = kv_ops.kv_encode(x.float().numpy(), codec)
    with cuda.installed():
        got = encode(x, codec, "key")
        back = decode(got, codec, "key", 64, dtype=str(dtype)[6:])
    np.testing.assert_array_equal(got, pages)
    assert torch.equal(back, torch.from_numpy(kv_ops.kv_decode(pages, codec, 64)).to(dtype))


@pytest.mark.parametrize("codec", CODECS)
def test_nan_stays_where_it_is(codec):
    """A row with NaN, or what shares a scale with it, is read back as NaN, all else as ever."""
    x = kv_cases.rows_of(np.random.default_rng(0), "gaussian", 2, 64)
    plain = kv_ops.kv_encode(x, codec, side="value")
    x[0, 7, 5] = x[1, 9, 0] = np.nan
    with cuda.installed():
        y = decode(encode(x, codec, "value"), codec, "value", 64).numpy()
    nan = [row for row in np.ndindex(2, PAGE) if np.isnan(y[row]).any()]
    assert nan == [(0, 7), (1, 9)]
    keep = np.isfinite(y)
    assert keep.sum() >= y.size - 2 * 64
    np.testing.assert_array_equal(y[keep], kv_ops.kv_decode(plain, codec, 64, side="value")[keep])


@pytest.mark.parametrize("codec", ["h3", "kivi2"])
def test_a_table_of_places(codec):
    """Pages of two sequences and two heads out of a pool; zeros where there is none."""
    x = kv_cases.rows_of(np.random.default_rng(3), "gaussian", 8, 64)
    pool = kv_ops.kv_encode(x, codec, side="value").reshape(4, 2, -1)
    table = np.int32([[3, -1, 0], [1, 2, -1]])
    with cuda.installed(check=True):
        got = decode(pool, codec, "value", 64, table=table).numpy()
    want = kv_ops.kv_decode(pool.reshape(8, -1), codec, 64, side="value").reshape(4, 2, PAGE, 64)
    for (s, p), place in np.ndenumerate(table):
        np.testing.assert_array_equal(got[s, :, p], 0 if place < 0 else want[place])


@pytest.mark.parametrize(("codec", "d"), [("h4", 96), ("turbo4", 32), ("affine8", 32)])
def test_widths_a_codec_cannot_store(codec, d):
    with pytest.raises((ContractError, UnsupportedError), match=f"head_dim is {d}"):
        cuda_kv.encode(1, codec, "key", d)
    with pytest.raises(UnsupportedError, match="head_dim is 160, on CUDA 32, 64, 128, 256"):
        cuda_kv.decode(1, codec, "key", 160)
    assert page_bytes("h4", 64)
