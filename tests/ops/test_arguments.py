"""What an op's front refuses before a kernel sees it: widths, dtypes and arrays of weights."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from hadamoe import ContractError, Rotation, Weight, ops
from hadamoe.verify.samples import plain_part

X = np.ones((2, 64), np.float32)
CODES, SCALE = np.zeros((3, 32), np.uint8), np.ones((3, 2), np.float32)
LINEAR = ("linear", 4, "f32")


def weight(columns=64, rows=3, experts=1, **more):
    part = plain_part(np.ones((rows, columns), np.float32))
    return Weight(columns, ((part,),) * experts, **more)


def of(instance=LINEAR, columns=64, codes=CODES, scale=SCALE, bias=SCALE, *more):
    return ops.pack(Weight.of(instance, columns, codes, scale, bias, *more))


def moe(**changes):
    sizes = {
        "router": (64, 2),
        "gate_up": (64, 16, 2),
        "down": (8, 64, 2),
        "shared_gate_up": (64, 16),
        "shared_down": (8, 64),
        "shared_gate": (64, 1),
    }
    return ops.MoeWeights.of(**{n: weight(*s) for n, s in sizes.items()} | changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.qmatmul(X[:, :32], weight()), "qmatmul: x has k=32, needs 64"),
        (lambda: ops.qmatmul(X, None), "qmatmul: weight is NoneType, needs a Weight or pack(it)"),
        (lambda: ops.qmatmul(np.array(1, "f4"), weight()),
         "qmatmul: x has shape (), needs at least one column"),
        (lambda: ops.qmatmul([1.0], weight()),
         "qmatmul: x is list, needs a numpy, torch or MLX array"),
        (lambda: ops.qmatmul(X.astype(">f4"), weight()),
         "qmatmul: input 0 is ndarray, needs an array of this machine's own numbers"),
        (lambda: ops.moe_decode(X[:, :32], moe(), top_k=1), "moe_decode: x has k=32, needs 64"),
        (lambda: moe(down=weight(16, 64, 2)), "MoeWeights.of: down has k=16, needs 8"),
        (lambda: moe(shared_gate=weight(32, 1)), "MoeWeights.of: shared_gate has k=32, needs 64"),
        (lambda: ops.MoeWeights.of(down=weight()),
         "MoeWeights.of: has ['down'], needs ['down', 'gate_up', 'router', 'shared_down', "
         "'shared_gate', 'shared_gate_up']"),
        (lambda: ops.hadamard(X, block=0),
         "hadamard: block is 0, needs a power of two up to 16384 or None"),
        (lambda: ops.hadamard(X, block=1 << 62),
         f"hadamard: block is {1 << 62}, needs a power of two up to 16384 or None"),
        (lambda: ops.hadamard(X[:, :0]), "hadamard: x has shape (2, 0), needs at least one column"),
        (lambda: ops.hadamard(X, pre=[1.0] * 64),
         "hadamard: input 1 is list, needs an array of this machine's own numbers"),
        (lambda: ops.dequantize(weight(), [0.7]), "dequantize: rows is float64, needs integers"),
        (lambda: ops.dequantize(weight(), 2),
         "dequantize: rows is int, needs a numpy, torch or MLX array"),
        (lambda: ops.dequantize(weight(), [0], dtype="bfloat16"),
         "dequantize: dtype is bfloat16, needs float32 or float16"),
        (lambda: ops.gated_delta(*[X] * 7, heads=(1, 1), head_dims=(1, 1)),
         "gated_delta: proj has 2 dimensions, needs 3"),
        (lambda: ops.set_threads(1025), "set_threads: count is 1025, needs 1 to 1024"),
        (lambda: of(("linear", 4, "bf16")),
         "pack: scale of linear4/bf16 is float32 [3, 2], needs uint16 [3, 2]"),
        (lambda: of(scale=None), "pack: scale of linear4/f32 is none, needs float32 [3, 1]"),
        (lambda: of(bias=SCALE[:, :1]),
         "pack: bias of linear4/f32 is float32 [3, 1], needs float32 [3, 2]"),
        (lambda: of(("linear_signed", 4, "f32")),
         "pack: bias of linear_signed4/f32 is float32 [3, 2], needs none"),
        (lambda: of(("codebook", 4, "f32"), 64, CODES, SCALE, None, np.zeros(16)),
         "pack: codebook of codebook4/f32 is float64 [16], needs float32 [16]"),
        (lambda: of(columns=0),
         "Weight.of: columns=0 and codes of shape (3, 32), need at least 1"),
        (lambda: of(codes=np.zeros((3, 64), np.uint8)[:, ::2]),
         "Weight.of: codes is not contiguous, needs row-major memory"),
    ],
)  # fmt: skip
def test_refused(call, message):
    with pytest.raises(ContractError) as error:
        call()
    assert str(error.value) == message


def test_torch_says_the_same():
    torch = pytest.importorskip("torch")
    with pytest.raises(ContractError, match=r"^qmatmul: x has k=32, needs 64$"):
        ops.qmatmul(torch.ones(2, 32), weight())
    with pytest.raises(
        ContractError, match=r"^qmatmul: expert has shape \(1, 2\), x has \(2, 64\)"
    ):
        ops.qmatmul(torch.ones(2, 64), weight(), expert=torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ContractError, match=r"^dequantize: rows is torch.float32, needs integers$"):
        ops.dequantize(weight(), torch.ones(1))


def test_mlx_says_the_same():
    mx = pytest.importorskip("mlx.core")
    with pytest.raises(ContractError, match=r"^qmatmul: expert is float32, needs integers$"):
        ops.qmatmul(mx.ones((2, 64)), weight(), expert=mx.zeros((2, 1)))
    with pytest.raises(ContractError, match=r"^dequantize: rows is float32, needs integers$"):
        ops.dequantize(weight(), mx.ones((1,)))


def test_packed_weights_lose_their_padding_too():
    w = weight(128, rotation=Rotation(128), in_features=100)
    assert ops.dequantize(ops.pack(w), [0]).shape == ops.dequantize(w, [0]).shape == (1, 100)


def test_threads_the_system_does_not_grant():
    """The op runs on those it does; a thread that cannot start must not end the process."""
    code = (
        "import resource, numpy as np; from hadamoe import ops\n"
        "resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))\n"
        "ops.set_threads(1024); print(ops.hadamard(np.ones((4096, 64), np.float32)).shape)"
    )
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.stdout == "(4096, 64)\n", run.stderr
