"""The simulator runs a kernel through `mx.fast.metal_kernel`."""

import numpy as np
import pytest

import simt

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
from simt import metal  # noqa: E402

pytestmark = pytest.mark.skipif(bool(metal.missing()), reason=str(metal.missing()))


def reverse(barrier: str) -> mx.array:
    kernel = mx.fast.metal_kernel(
        name="reverse",
        input_names=["x"],
        output_names=["y"],
        source=f"""
            threadgroup float s[64];
            uint i = thread_position_in_threadgroup.x;
            s[i] = x[thread_position_in_grid.x];
            {barrier}
            y[thread_position_in_grid.x] = s[63 - i];
        """,
    )
    x = mx.arange(128, dtype=mx.float32)
    return kernel(
        inputs=[x],
        grid=(128, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )[0]


@pytest.mark.parametrize("check", [False, True])
def test_runs(check):
    with metal.installed(check=check) as log:
        assert mx.metal.is_available()
        assert mx.default_device() == mx.gpu
        y = reverse("threadgroup_barrier(mem_flags::mem_threadgroup);")
    x = np.arange(128).reshape(2, 64)[:, ::-1]
    assert np.array_equal(np.array(y), x.reshape(-1))
    assert log[0].name == "custom_kernel_reverse_float_float"
    assert log[0].threadgroup_bytes == 256
    if check:
        assert log[0].traffic == {"x": (512, 0), "y": (0, 512)}
    assert mx.default_device() == mx.cpu


def test_a_missing_barrier_is_found():
    with pytest.raises(simt.CheckError, match="race"), metal.installed(check=True):
        reverse("")


def softmax() -> np.ndarray:
    kernel = mx.fast.metal_kernel(
        name="softmax",
        input_names=["x"],
        output_names=["y"],
        source="""
            uint i = thread_position_in_grid.x;
            float e = exp(x[i]);
            y[i] = e / simd_sum(e);
        """,
    )
    x = 4 * mx.sin(mx.arange(32, dtype=mx.float32))
    arguments = {"output_shapes": [x.shape], "output_dtypes": [x.dtype]}
    arguments |= {"grid": (32, 1, 1), "threadgroup": (32, 1, 1)}
    return np.array(kernel(inputs=[x], **arguments)[0])


@pytest.mark.parametrize(
    "variant", [{"order": "sequential"}, {"order": "reversed"}, {"ulp": 4}, {"schedule": "random"}]
)
def test_variants_differ_by_rounding(variant):
    with metal.installed():
        plain = softmax()
    with metal.installed(**variant):
        other = softmax()
    assert np.array_equal(plain, other) == ("schedule" in variant)
    assert np.allclose(plain, other, rtol=2e-6, atol=0)
