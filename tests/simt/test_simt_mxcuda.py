"""The stand-in for `mx.fast.cuda_kernel`: its text, and MLX's documented example in it."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from simt import CheckError, toolchain

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
from simt import cuda, mxcuda  # noqa: E402

pytestmark = pytest.mark.skipif(bool(toolchain.missing()), reason=str(toolchain.missing()))

# mlx/backend/cuda/custom_kernel.cpp of MLX 0.32.2, read for these arguments.
TEXT = """
#include "mlx/backend/cuda/device/utils.cuh"

#include <cooperative_groups.h>

// header
namespace mlx::core::cu {

namespace cg = cooperative_groups;

__global__ void custom_kernel_name_bfloat16_t_3_t(
    const __nv_bfloat16* x,
    const __grid_constant__ Shape x_shape,
    const __grid_constant__ int x_ndim,
    const int32_t* n,
    float* y,
    bool* z) {
  using T = __nv_bfloat16;
  constexpr int N = 3;
  constexpr bool B = true;

y[0] = x_shape[0] + x_ndim + n_shape;
}

} // namespace mlx::core::cu
"""


def test_the_text_is_mlxs():
    name, text = mxcuda.generate(
        "name",
        ["x", "n"],
        ["y", "z"],
        "y[0] = x_shape[0] + x_ndim + n_shape;",
        "// header\n",
        [mx.zeros((2, 3), mx.bfloat16), mx.array(1)],  # a scalar has no shape parameter
        [mx.float32, mx.bool_],
        [("T", mx.bfloat16), ("N", 3), ("B", True)],
    )
    assert name == "custom_kernel_name_bfloat16_t_3_t"
    assert text == TEXT


def test_the_signature_is_mlxs():
    line = next(x for x in mx.fast.cuda_kernel.__doc__.splitlines() if "cuda_kernel(" in x)
    with cuda.installed():
        ours = inspect.signature(mx.fast.cuda_kernel)
    at = -1
    for name, parameter in ours.parameters.items():
        found = line.index(f"{name}:", at + 1)
        assert found > at
        at = found
        default = parameter.default
        assert default is inspect.Parameter.empty or f"{default!r}"[:4] in line[at:]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_mlxs_example(dtype):
    """The kernel of mx.fast.cuda_kernel's documentation."""
    a = (mx.arange(256) / 64 - 2).reshape(16, 16).astype(dtype)
    with cuda.installed(check=True) as log:
        kernel = mx.fast.cuda_kernel(
            name="myexp",
            input_names=["inp"],
            output_names=["out"],
            source="""
                auto elem = cooperative_groups::this_grid().thread_rank();
                T tmp = inp[elem];
                out[elem] = exp(tmp);
            """,
        )
        (got,) = kernel(
            inputs=[a],
            template=[("T", dtype)],
            grid=(a.size, 1, 1),
            threadgroup=(256, 1, 1),
            output_shapes=[a.shape],
            output_dtypes=[a.dtype],
        )
    assert got.dtype == dtype
    assert mx.allclose(got, mx.exp(a), rtol=1e-6)
    size = a.nbytes
    assert log[0].traffic == {"inp": (size, 0), "out": (0, size)}


def transposed(source: str, **launch) -> mx.array:
    kernel = mx.fast.cuda_kernel(
        name="t",
        input_names=["x"],
        output_names=["y"],
        source=source,
        shared_memory=launch.pop("shared_memory", 0),
    )
    return kernel(
        inputs=[mx.arange(12, dtype=mx.float32).reshape(3, 4)],
        grid=(12, 1, 1),
        threadgroup=(32, 1, 1),  # a whole block: 20 threads too many
        output_shapes=[(4, 3)],
        output_dtypes=[mx.float32],
        **launch,
    )[0]


BODY = """
    extern __shared__ float s[];
    int i = threadIdx.x;
    if (i < x_shape[0] * x_shape[1]) s[i] = x[i];
    __syncthreads();
    if (i < 12) y[i] = s[i % x_shape[0] * x_strides[0] + i / x_shape[0] * x_strides[1]];
"""


def test_shapes_strides_and_shared_memory():
    with cuda.installed(check=True) as log:
        y = transposed(BODY, shared_memory=48)
    assert np.array_equal(np.array(y), np.arange(12).reshape(3, 4).T)
    assert log[0].threadgroup_bytes == 48


def test_findings_are_raised():
    with pytest.raises(CheckError, match="uninitialised"), cuda.installed(check=True):
        transposed(BODY.replace("s[i] = x[i]", ";"), shared_memory=48)


def test_initial_values():
    with cuda.installed(check=True):
        y = transposed("if (threadIdx.x == 0) y[0] = x[1];", init_value=2.5)
    assert list(np.array(y).reshape(-1)) == [1.0] + [2.5] * 11
