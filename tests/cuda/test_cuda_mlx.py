"""hadamoe.mlx where MLX has a CUDA device: cuda/*.cuh through mx.fast.cuda_kernel."""

from __future__ import annotations

import re

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
import nvrtc  # noqa: E402
from mlx_cases import check  # noqa: E402
from simt import cuda  # noqa: E402

from hadamoe import Instance, mlx, mlx_cuda, mlx_gpu, reference  # noqa: E402
from hadamoe.cuda_plan import Launch  # noqa: E402
from hadamoe.errors import ContractError  # noqa: E402
from hadamoe.gpu_plan import Output  # noqa: E402
from hadamoe.verify import cases, layers  # noqa: E402

pytestmark = [
    pytest.mark.simulator,  # --device is torch's GPU, not MLX's
    pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing())),
]

INSTANCES = [
    Instance("linear", 4, "bf16"),
    Instance("e2m1", 4, "e8m0"),
    Instance("codebook", 2, "f16"),
    Instance("plain", 16, "bf16"),
]


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def test_the_device_chooses_the_route():
    outside = mlx.route()
    with cuda.installed():
        assert (mlx.route(), mlx_gpu.device()) == ("cuda", "cuda")
        assert mlx_gpu.front() is mlx_cuda.FRONT
    assert mlx.route() == outside != "cuda"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hadamard(rng, dtype):
    x = mx.array(rng.standard_normal((2, 3, 12288)).astype("f4")).astype(getattr(mx, dtype))
    signs = rng.choice(np.float32([-1, 1]), 12288)
    want = reference.hadamard(np.array(x.astype(mx.float32)), pre=signs)
    with cuda.installed() as log:
        got = mlx.hadamard(x, pre=signs)
        mx.eval(got)
    assert len(log) == 2  # blocks of 8192 and 4096, in pieces of 4096
    assert got.dtype == x.dtype
    assert mx.array_equal(got, mx.array(want).astype(got.dtype))


@pytest.mark.parametrize("inst", INSTANCES, ids=str)
def test_products(inst):
    """Several tokens, parts and experts, f32 and f16, and rows of a weight."""
    some = [*list(cases.qmatmul_cases(inst, "integer"))[2::5], *cases.dequantize_cases(inst)][::2]
    with cuda.installed(check=True) as log:
        for case in some:
            check(case)
    kinds = {tuple(re.findall("#define HM_KINDS.*", launch.source)) for launch in log}
    assert len(kinds) > 1  # a text is for the kinds of parts at hand


def test_the_largest_products():
    with cuda.installed():
        for case in list(layers.qmatmul_top_cases())[:3]:
            check(case)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("padding", ["none", "lengths", "mask"])
def test_gated_delta(rng, tokens, padding):
    made = layers.gated_delta_arrays(rng, 3, tokens, 2, 4, 32, 32, 4)
    arrays = [mx.array(a) for a in made.values()]
    lengths = mx.array([tokens, 1, 0])
    options = {
        "none": {}, "lengths": {"lengths": lengths},
        "mask": {"mask": mx.arange(tokens) < lengths[:, None]},
    }[padding]  # fmt: skip
    options |= {"heads": (2, 4), "head_dims": (32, 32)}
    want = mlx.gated_delta(*arrays, **options)
    mx.eval(want)
    with cuda.installed(check=True) as log:
        got = mlx.gated_delta(*arrays, **options)
        mx.eval(got)
    assert len(log) == (2 if tokens == 1 else 3)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_kernel_is_given_nothing_that_its_contract_forbids(rng):
    x = mx.array(rng.standard_normal((2, 96)).astype("f4"))
    with cuda.installed() as log, pytest.raises(ContractError, match="pre has"):
        mlx.hadamard(x, pre=np.ones(5, "f4"))
    assert not log


def test_another_length_is_the_same_text(rng):
    texts = set()
    for rows in (1, 5, 64):
        with cuda.installed() as log:
            mx.eval(mlx.hadamard(mx.array(rng.standard_normal((rows, 256)).astype("f4"))))
        texts |= {launch.source for launch in log}
    (text,) = texts
    assert len(text) < 1000  # MLX hashes it at each launch


def launch_of(shared: int) -> Launch:
    sizes = {"columns": 8, "wide": 8, "block": 0, "pres": 1, "posts": 1, "span": 8}
    sizes |= {"eps": 0.0, "x_dtype": 0, "y_dtype": 0}
    inputs = {"x": True, "gamma": False, "pre": False, "post": False}
    y = (Output("y", (1, 8), "float32"),)
    return Launch("hadamard", "hadamard", (1,), inputs, y, sizes, (1, 1, 1), 32, shared)


def test_more_shared_memory_is_another_kernel():
    """MLX asks the driver for a kernel's shared memory when it first launches it, and not again."""
    names = set()
    for shared in (1000, 2000, 122880, 70000):
        with cuda.installed() as log:
            (y,) = mlx_gpu.run(launch_of(shared), {"x": mx.ones((1, 8))})
        assert log[0].threadgroup_bytes == shared
        assert y[0, 0] == mx.array(8.0) / mx.sqrt(mx.array(8.0))
        names.add(log[0].name)
    assert len(names) == 3


@pytest.mark.skipif(nvrtc.folder() is None, reason="nvidia-cuda-nvrtc is not installed")
def test_nvrtc_compiles_the_text():
    with cuda.installed() as log:
        mlx_gpu.run(launch_of(1000), {"x": mx.ones((1, 8))})
    ptx = nvrtc.compile_text(log[0].source, log[0].name)
    assert ".maxntid 256, 1, 1" in ptx  # the bounds of launches that the struct has
