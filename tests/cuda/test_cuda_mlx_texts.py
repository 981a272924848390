"""Every text that MLX would compile for products and rotations on CUDA."""

from __future__ import annotations

from functools import partial

import numpy as np
import nvrtc
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
from mlx_texts import compiles, kernels_of, texts_of  # noqa: E402
from simt import cuda_launch  # noqa: E402

from hadamoe import mlx, ops  # noqa: E402
from hadamoe.verify import samples  # noqa: E402

pytestmark = [
    pytest.mark.simulator,  # of an MLX that has CUDA
    pytest.mark.skipif(nvrtc.folder() is None, reason="nvidia-cuda-nvrtc is not installed"),
]
INSTANCES = ops.instances()


def weight(inst, rows, columns=256, experts=1):
    rng = np.random.default_rng(0)
    return ops.pack(samples.random_weight(rng, inst, rows, columns, experts=experts))


def first(tokens, k=2):
    """i32: the first experts, for each of tokens."""
    return mx.zeros((tokens, k), mx.int32)


def one_token(instances):
    for inst in instances:
        mlx.qmatmul(mx.zeros((1, 256)), weight(inst, 24))


def more_tokens():
    """Two and four at once, of each table; of experts; f16 and bf16."""
    for inst in {i.table: i for i in INSTANCES}.values():
        for tokens in (2, 4):
            mlx.qmatmul(mx.zeros((tokens, 256)), weight(inst, 24))
    inst, other = INSTANCES[0], INSTANCES[-1]
    mlx.qmatmul(mx.zeros((1, 256)), weight(inst, 24, experts=2), expert=first(1))
    for dtype in (mx.float16, mx.bfloat16):
        mlx.qmatmul(mx.zeros((1, 256), dtype), weight(other, 24))


def prompts():
    one, many = (weight(INSTANCES[0], 24, experts=e) for e in (1, 2))
    for tokens, dtype in ((16, mx.float32), (200, mx.bfloat16)):
        mlx.qmatmul(mx.zeros((tokens, 256), dtype), one)
        mlx.qmatmul(mx.zeros((tokens, 256)), many, expert=first(tokens))


def rows_and_rotations():
    mlx.dequantize(weight(INSTANCES[0], 24), mx.array([0, 1]))
    for columns in (256, 512, 1024, 2048, 4096, 8192, 24576):
        mlx.hadamard(mx.zeros((1, columns)))
    signs = np.ones(12288, "f4")
    mlx.hadamard(mx.zeros((1, 12288), mx.bfloat16), pre=signs, post=signs)
    mlx.qmatmul_top(mx.zeros((1, 256)), weight(INSTANCES[0], 9000), 5, norm=mx.ones(256))


CALLS = {
    **{f"one token {i}": partial(one_token, INSTANCES[i::4]) for i in range(4)},
    "more tokens": more_tokens,
    "prompts": prompts,
    "rows and rotations": rows_and_rotations,
}
OURS = ("qmat", "dequantize", "hadamard", "largest")


@pytest.mark.parametrize("name", CALLS)
def test_nvrtc_compiles(name):
    compiles(texts_of(CALLS[name]))


def test_every_kernel_is_among_them():
    found = kernels_of(CALLS.values())
    assert found >= {name for name in cuda_launch.compiled() if name.startswith(OURS)}
