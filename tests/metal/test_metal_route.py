"""hadamoe.mlx where MLX has a Metal device: kernels, behind the contract of the native op."""

from __future__ import annotations

import numpy as np
import pytest
from simt import metal

from hadamoe.errors import ContractError
from hadamoe.verify import layers

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
from hadamoe import mlx  # noqa: E402

HEADS = {"heads": (2, 4), "head_dims": (32, 32)}


@pytest.fixture
def arrays():
    made = layers.gated_delta_arrays(np.random.default_rng(0), 3, 5, 2, 4, 32, 32, 4)
    return {name: mx.array(a) for name, a in made.items()}


@pytest.mark.parametrize("padding", ["none", "lengths", "mask"])
def test_the_device_chooses_the_route_and_not_the_result(arrays, padding):
    lengths = mx.array([5, 2, 0])
    options = {
        "none": {}, "lengths": {"lengths": lengths},
        "mask": {"mask": mx.arange(5) < lengths[:, None]},
    }[padding]  # fmt: skip
    want = mlx.gated_delta(*arrays.values(), **HEADS, **options)
    mx.eval(want)
    with metal.installed() as log:
        assert mlx.route() == "metal"
        got = mlx.gated_delta(*arrays.values(), **HEADS, **options)
        mx.eval(got)
    assert len(log) == 1
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("state", lambda a: a[1:], "state has b=2, needs 3"),
        ("state", lambda a: a.astype(mx.bfloat16), "state is bf16, needs f32"),
        ("conv_weight", lambda a: a[1:], "conv_weight has c=255, needs 256"),
        ("proj", lambda a: a.astype(mx.int32), "proj is i32, needs f32 bf16 f16"),
        ("proj", lambda a: a > 0, "proj is bool, needs f32 bf16 f16"),
    ],
)
def test_a_kernel_is_given_nothing_that_its_contract_forbids(arrays, name, change, message):
    arrays[name] = change(arrays[name])
    with metal.installed() as log, pytest.raises(ContractError, match=f"^gated_delta: {message}"):
        mlx.gated_delta(*arrays.values(), **HEADS)
    assert not log
