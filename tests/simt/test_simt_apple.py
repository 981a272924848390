"""The Metal shim against Apple's compiler: the same kernel from both, byte for byte.

mlx.metallib in MLX's macOS wheel is MLX's kernels compiled by Apple. Equal bytes say that the shim
parses, types, converts and rounds as Apple's front end does; the GPU's back end is not seen.
"""

from __future__ import annotations

import numpy as np
import pytest

from simt import metal, peers
from simt.toolchain import CompileError

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
from simt.mxfast import to_numpy  # noqa: E402

pytestmark = [
    pytest.mark.skipif(bool(metal.missing()), reason=str(metal.missing())),
    pytest.mark.skipif(
        metal.missing() is None and peers.library() is None,
        reason="PyPI is out of reach: no mlx-metal wheel for macOS",
    ),
]

DTYPES = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}
ROWS, COLUMNS, TOKENS, HEADS = 64, 512, 33, 32


def random(shape, dtype: str, scale: float = 1.0) -> np.ndarray:
    """Gaussian numbers of a dtype; bf16 as bits."""
    values = scale * np.random.default_rng(sum(shape)).standard_normal(shape)
    return to_numpy(mx.array(values.astype("f4")).astype(DTYPES[dtype]))


def quantized(dtype: str, **how) -> list[np.ndarray]:
    """A random matrix in one of MLX's formats: codes, scales and perhaps biases."""
    values = np.random.default_rng(7).standard_normal((ROWS, COLUMNS)).astype("f4")
    return [to_numpy(a) for a in mx.quantize(mx.array(values).astype(DTYPES[dtype]), **how)]


def affine(make, tokens: int, bits: int, dtype: str) -> peers.Peer:
    parts = quantized(dtype, bits=bits, group_size=64)
    return make(random((tokens, COLUMNS), dtype), *parts, bits=bits)


def mxfp4(make, tokens: int, dtype: str) -> peers.Peer:
    return make(random((tokens, COLUMNS), dtype), *quantized(dtype, mode="mxfp4"))


def experts(dtype: str, **how) -> peers.Peer:
    """Two of four experts for each of three tokens."""
    stacked = [a.reshape(4, ROWS // 4, -1) for a in quantized(dtype, **how)]
    chosen = np.array([[0, 3], [2, 1], [3, 2]], np.uint32)
    return peers.gather_qmv(random((3, COLUMNS), dtype), chosen, *stacked)


def sdpa(dtype: str) -> peers.Peer:
    shape = (2, 70, 256)
    return peers.sdpa(random((4, 256), dtype), random(shape, dtype), random(shape, dtype), 1 / 16)


def gated_delta(dtype: str, chunk: int) -> peers.Peer:
    tokens = 11  # one whole chunk of 8 and a part
    keys, gates = (tokens, HEADS // 2, 128), (tokens, HEADS)
    return peers.gated_delta(
        random(keys, dtype, 0.09),
        random(keys, dtype, 0.09),
        random((tokens, HEADS, 128), dtype),
        np.where(random(gates, "f32") > 0, random(gates, dtype), random(gates, dtype, 0.5)),
        random(gates, dtype),
        random((HEADS, 128, 128), "f32"),
        chunk=chunk,
    )


CASES = {
    **{f"qmv {b} bits": lambda d, b=b: affine(peers.qmv, 1, b, d) for b in (2, 3, 4, 8)},
    "qmm 4 bits": lambda d: affine(peers.qmm, TOKENS, 4, d),
    "qmv mxfp4": lambda d: mxfp4(peers.qmv, 1, d),
    "qmm mxfp4": lambda d: mxfp4(peers.qmm, TOKENS, d),
    "experts 4 bits": lambda d: experts(d, bits=4, group_size=64),
    "experts mxfp4": lambda d: experts(d, mode="mxfp4"),
    "sdpa": sdpa,
    "gated delta": lambda d: gated_delta(d, 0),
    "gated delta in chunks": lambda d: gated_delta(d, 8),
    "softmax": lambda d: peers.softmax(random((3, 500), d)),
}


def same_bytes(a: peers.Run, b: peers.Run) -> bool:
    return all(a.outputs[i].tobytes() == b.outputs[i].tobytes() for i in a.outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_same_bytes_as_apples_compiler(name, dtype):
    peer = CASES[name](dtype)
    ours, apples = peer.run(), peer.run_apple()
    assert not ours.result.findings
    assert not apples.result.findings
    assert any(a.any() for a in ours.outputs.values())
    assert same_bytes(ours, apples)


def test_the_comparison_can_fail():
    """Two roundings in a * b + c instead of one is all it takes."""
    peer = affine(peers.qmv, 1, 4, "f32")
    assert not same_bytes(peer.run(contract=False), peer.run_apple())


def test_denormals_are_flushed_in_both():
    x = np.full((1, COLUMNS), 1e-39, np.float32)
    peer = peers.qmv(x, *quantized("f32", bits=4, group_size=64), bits=4)
    assert not peer.run().y.any()
    assert not peer.run_apple().y.any()
    assert peer.run(ftz=False).y.any()


def test_rms_norm_of_apple_is_rms_norm_of_mlx():
    """MLX ships no header of this one: Apple's compilation against MLX on the CPU, bit for bit."""
    x, w = random((4, 512), "bf16"), random((512,), "bf16")
    buffers = dict(enumerate([x, w, np.zeros_like(x), np.float32([1e-6])]))
    buffers |= {4: np.uint32([512]), 5: np.uint32([1])}
    kernel = peers.apple_kernel("rmsbfloat16", ())
    kernel(buffers, (128, 1, 1), groups=(4, 1, 1), ftz=True)
    as_mlx = [mx.array(a).view(mx.bfloat16) for a in (x, w)]
    assert np.array_equal(buffers[2], to_numpy(mx.fast.rms_norm(*as_mlx, 1e-6)))


def test_unknown_names_are_refused():
    with pytest.raises(KeyError, match="no_such_kernel"):
        peers.apple_kernel("no_such_kernel", ())
    with pytest.raises(KeyError, match="function constants"):
        peers.apple_kernel("rmsbfloat16", ((3, 1),))


def test_an_intrinsic_without_a_body_is_named():
    with pytest.raises(CompileError, match=r"gn1_Log.*undefined symbol: air.atan2"):
        peers.apple_kernel("gn1_Logcomplex64complex64", ())
