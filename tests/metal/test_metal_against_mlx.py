"""Our products on Metal beside MLX's own kernels, on the same arrays in the same simulator.

Both read a weight for one token. Ours must not read more of its bytes, nor touch more of the
128-byte lines memory hands out; its error, rms against f64, is at most a tenth larger.
"""

from __future__ import annotations

import numpy as np
import pytest
from simt import metal, peers
from simt.mxfast import to_numpy

from hadamoe import Instance, mlx_gpu
from hadamoe.packed import pack
from hadamoe.weight import Part, Weight

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
pytestmark = [
    pytest.mark.skipif(bool(metal.missing()), reason=str(metal.missing())),
    pytest.mark.simulator,
]

ROWS, COLUMNS, GROUP = 256, 2048, 64
WEIGHT = ("w", "scales", "biases", "words")  # MLX's buffers, and ours


def part_of(parts: list[np.ndarray], bits: int) -> Part:
    """MLX's arrays as they are: f32 scales and biases, or E8M0 scales."""
    codes = parts[0].view(np.uint8)
    if len(parts) == 2:
        return Part(Instance("e2m1", 4, "e8m0"), len(codes), 32, codes, parts[1])
    return Part(Instance("linear", bits, "f32"), len(codes), GROUP, codes, *parts[1:])


def case(bits: int, rows: int):
    """A random matrix as MLX stores it (0 bits: MXFP4), and its numbers in f64."""
    how = {"group_size": GROUP, "bits": bits} if bits else {"mode": "mxfp4"}
    given = np.random.default_rng(bits).standard_normal((rows, COLUMNS)).astype("f4")
    stored = mx.quantize(mx.array(given), **how)
    numbers = np.array(mx.dequantize(*stored, **how, dtype=mx.float32), np.float64)
    return [to_numpy(a) for a in stored], numbers


def moved(traffic, what: str) -> int:
    """A count of the traffic of the weights."""
    return sum(getattr(traffic[name], what) for name in WEIGHT if name in traffic)


def assert_no_worse(ours, y, theirs: peers.Run, want: np.ndarray) -> None:
    for what in ("read", "lines_read"):
        assert moved(ours, what) <= moved(theirs.result.traffic, what), what
    error = [np.sqrt(np.mean((got.reshape(want.shape) - want) ** 2)) for got in (y, theirs.y)]
    assert error[0] <= 1.1 * error[1]


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 0])
def test_one_token(bits):
    parts, numbers = case(bits, ROWS)
    x = np.random.default_rng(9).standard_normal((1, COLUMNS)).astype("f4")
    weight = mlx_gpu.resident(pack(Weight(COLUMNS, ((part_of(parts, bits),),), None)))
    with metal.installed(check=True, transactions=True) as log:
        y = np.array(mlx_gpu.product(mx.array(x), weight))
    theirs = peers.qmv(x, *parts, bits=bits, group=GROUP).run(check=True, transactions=True)
    assert len(log) == 1
    assert not theirs.result.findings
    assert_no_worse(log[0].traffic, y, theirs, x.astype("f8") @ numbers.T)


@pytest.mark.parametrize("bits", [4, 0])
def test_chosen_experts(bits):
    experts = 4
    parts, numbers = case(bits, ROWS)
    stacked = [a.reshape(experts, ROWS // experts, -1) for a in parts]
    x = np.random.default_rng(9).standard_normal((2, COLUMNS)).astype("f4")
    chosen = np.array([[2, 0, 3], [1, 3, 0]], np.uint32)
    each = tuple((part_of(list(expert), bits),) for expert in zip(*stacked, strict=True))
    weight = mlx_gpu.resident(pack(Weight(COLUMNS, each, None)))
    with metal.installed(check=True, transactions=True) as log:
        expert = mx.array(chosen.astype(np.int32))
        y = np.array(mlx_gpu.product(mx.array(x), weight, expert=expert))
    peer = peers.gather_qmv(x, chosen, *stacked, bits=bits, group=GROUP)
    theirs = peer.run(check=True, transactions=True)
    assert len(log) == 1
    rows = numbers.reshape(experts, -1, COLUMNS)[chosen]
    assert_no_worse(log[0].traffic, y, theirs, np.einsum("tk,tcnk->tcn", x.astype("f8"), rows))
