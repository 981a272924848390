"""Pages on Metal: `kv_encode` and `kv_decode` in the simulator have the CPU kernels' bits."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from page_cases import any_codes, rows
from simt import metal

from hadamoe import kv_ops, metal_plan, mlx_gpu_kv, mlx_kv
from hadamoe.kv import CODECS, PAGE, page_bytes
from hadamoe.verify import kv_cases

pytestmark = pytest.mark.skipif(metal.missing() is not None, reason=str(metal.missing()))

VARIANTS = list(metal.variants())
DTYPES = {"float32": np.float32, "float16": np.float16}


def equal_to_the_cpu(codec: str, side: str, d: int, scale: float = 1.0, **options) -> None:
    x = rows(d)
    pages = kv_ops.kv_encode(x, codec, side=side, scale=scale)
    codes = any_codes(pages, codec, d)
    decoded = kv_ops.kv_decode(codes, codec, d, side=side, scale=scale)
    with metal.installed(**options) as log:
        got = mlx_gpu_kv.kv_encode(mx.array(x), codec, side=side, scale=scale)
        back = mlx_gpu_kv.kv_decode(mx.array(codes), codec, d, side=side, scale=scale)
    np.testing.assert_array_equal(got, pages)
    np.testing.assert_array_equal(np.array(back).view(np.uint32), decoded.view(np.uint32))
    assert len(log) == 2
    for launch in log:
        assert len(launch.source) < 10000  # with MLX's signature
        assert launch.threadgroup_bytes == 0
        assert launch.threadgroup[0] <= 256


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("codec", CODECS)
def test_bits_of_the_cpu(codec, side):
    """Every codec; races, bounds and what nobody wrote are looked for."""
    equal_to_the_cpu(codec, side, 64, check=True)
    equal_to_the_cpu(codec, side, 256)


@pytest.mark.parametrize("codec", ["h2", "h3", "h8", "turbo3", "affine4", "kivi2", "fp8"])
def test_bits_of_the_cpu_under_every_variant(codec):
    for options in VARIANTS:
        equal_to_the_cpu(codec, "value", 64, **options)
    for options in ({"contract": False}, {"order": "sequential"}):
        equal_to_the_cpu(codec, "key", 64, **options)


@pytest.mark.parametrize(
    ("codec", "d"), [("h4", 32), ("h3", 128), ("h8", 512), ("turbo4", 128), ("affine8", 192),
                     ("kivi4", 96), ("bf16", 32), ("fp8", 160)]
)  # fmt: skip
def test_other_widths(codec, d):
    for side in ("key", "value"):
        equal_to_the_cpu(codec, side, d)


@pytest.mark.parametrize("scale", [0.5, 0.03])
def test_scales_of_fp8(scale):
    equal_to_the_cpu("fp8", "key", 64, scale)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("codec", ["h4", "turbo2", "kivi4"])
def test_dtypes(codec, dtype):
    """Rows of any float dtype are widened first, numbers are rounded to one last."""
    kind = getattr(mx, dtype)
    x = mx.array(rows(64)[:2]).astype(kind)
    wide = np.array(x.astype(mx.float32))
    pages = kv_ops.kv_encode(wide, codec)
    with metal.installed():
        got = mlx_gpu_kv.kv_encode(x, codec, side="key")
        back = mlx_gpu_kv.kv_decode(got, codec, 64, side="key", dtype=kind)
    np.testing.assert_array_equal(got, pages)
    want = mx.array(kv_ops.kv_decode(pages, codec, 64)).astype(kind)
    assert back.dtype == kind
    np.testing.assert_array_equal(back.astype(mx.float32), want.astype(mx.float32))


@pytest.mark.parametrize("codec", CODECS)
def test_nan_stays_where_it_is(codec):
    """A row with NaN, or what shares a scale with it, is read back as NaN, all else as ever."""
    x = kv_cases.rows_of(np.random.default_rng(0), "gaussian", 2, 64)
    plain = kv_ops.kv_encode(x, codec, side="value")
    x[0, 7, 5] = x[1, 9, 0] = np.nan
    with metal.installed():
        pages = mlx_gpu_kv.kv_encode(mx.array(x), codec, side="value")
        y = np.array(mlx_gpu_kv.kv_decode(pages, codec, 64, side="value"))
    nan = [row for row in np.ndindex(2, PAGE) if np.isnan(y[row]).any()]
    assert nan == [(0, 7), (1, 9)]
    keep = np.isfinite(y)
    assert keep.sum() >= y.size - 2 * 64
    np.testing.assert_array_equal(y[keep], kv_ops.kv_decode(plain, codec, 64, side="value")[keep])


@pytest.mark.parametrize("codec", ["h4", "affine4", "kivi2"])
def test_mlx_kv_takes_the_device(codec):
    """`mlx_kv` launches one kernel a call where there is a Metal device."""
    x = kv_cases.rows_of(np.random.default_rng(0), "gaussian", 4, 64).reshape(2, 2, PAGE, 64)
    with metal.installed() as log:
        pages = mlx_kv.kv_encode(mx.array(x), codec, side="key")
        y = mlx_kv.kv_decode(pages, codec, 64, side="key")
    assert len(log) == 2
    assert pages.shape == (2, 2, page_bytes(codec, 64))
    want = kv_ops.kv_encode(x.reshape(4, PAGE, 64), codec)
    np.testing.assert_array_equal(np.array(pages).reshape(4, -1), want)
    assert y.shape == x.shape


@pytest.mark.parametrize("stem", ["kv_encode", "kv_encode_turbo", "kv_encode_linear", "kv_decode"])
def test_text_is_small(stem):
    assert len(metal_plan.source(stem)) < 8192
