"""MLX's own Metal kernels in the simulator: right against f64, and what they read and write.

The bytes are what our kernels have to beat; mlx.metallib says the same text is what Apple compiles
(test_simt_apple.py).
"""

from __future__ import annotations

import numpy as np
import pytest

from simt import metal, peers

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
from simt.mxfast import to_numpy  # noqa: E402

pytestmark = pytest.mark.skipif(bool(metal.missing()), reason=str(metal.missing()))
ROWS, COLUMNS = 64, 512
EPSILON = 2.0**-23


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype("f4")


def quantized(rows: int = ROWS, columns: int = COLUMNS, **how) -> tuple[list[np.ndarray], ...]:
    """Codes, scales and perhaps biases of a random matrix, and its numbers in f64."""
    parts = mx.quantize(mx.array(random(rows, columns)), **how)
    numbers = mx.dequantize(*parts, **how, dtype=mx.float32)
    return [to_numpy(p) for p in parts], np.array(numbers, np.float64)


def assert_sums(y: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    """y = x @ w^T but for f32 sums of as many terms as there are columns."""
    terms = np.abs(x).astype("f8") @ np.abs(w).swapaxes(-1, -2)
    error = np.abs(y - (x.astype("f8") @ w.swapaxes(-1, -2)).reshape(y.shape))
    bound = (8 + 2 * np.sqrt(w.shape[-1])) * EPSILON * terms
    assert (error <= bound.reshape(y.shape)).all()


@pytest.mark.parametrize("columns", [512, 288])  # the fast kernel, and the one with a tail
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine_matvec(bits, columns):
    how = {"bits": bits, "group_size": 32}
    parts, w = quantized(columns=columns, **how)
    x = random(2, columns)
    run = peers.qmv(x, *parts, bits=bits, group=32).run(check=True)
    assert not run.result.findings
    assert_sums(run.y, x, w)
    tokens = len(x)  # a threadgroup serves one token: weights are read once for each
    assert run.result.traffic["w"] == (tokens * parts[0].nbytes, 0)
    assert run.bytes_written == run.y.nbytes


def test_mxfp4_matvec():
    parts, w = quantized(mode="mxfp4", group_size=32, bits=4)
    x = random(1, COLUMNS)
    run = peers.qmv(x, *parts).run(check=True)
    assert not run.result.findings
    assert_sums(run.y, x, w)
    assert run.result.traffic["w"] == (parts[0].nbytes, 0)
    # each scale is read by the two lanes that share its group
    assert run.result.traffic["scales"] == (2 * parts[1].nbytes, 0)


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_chosen_experts(mode):
    parts, w = quantized(mode=mode, bits=4, group_size=32)
    stacked = [p.reshape(4, ROWS // 4, -1) for p in parts]
    x, chosen = random(3, COLUMNS), np.array([[0, 3], [2, 1], [3, 2]], np.uint32)
    run = peers.gather_qmv(x, chosen, *stacked, group=32).run(check=True)
    assert not run.result.findings
    for y, row, experts in zip(run.y, x, chosen, strict=True):
        assert_sums(y, row[None], w.reshape(4, ROWS // 4, -1)[experts])
    read = chosen.size * stacked[0][0].nbytes  # two tokens with one expert read it twice
    assert run.result.traffic["w"] == (read, 0)


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_matmul_in_tiles(mode):
    how = {"mode": mode, "bits": 4, "group_size": 32}
    parts, w = quantized(**how)
    x = random(33, COLUMNS)
    run = peers.qmm(x, *parts, group=32).run(check=True)
    assert not run.result.findings
    assert_sums(run.y, x, w)
    tiles = 2  # of 32 tokens: each reads the weights again
    assert run.result.traffic["w"][0] % (tiles * parts[0].nbytes) == 0
    assert run.result.threadgroup_bytes <= 16384


@pytest.mark.parametrize("size", [128, 512, 2048])
def test_hadamard(size):
    x = random(3, size)
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    run = peers.hadamard(x, size**-0.5).run(check=True)
    assert not run.result.findings
    assert np.abs(run.y - x @ h / size**0.5).max() <= 8 * size.bit_length() * EPSILON
    assert (run.bytes_read, run.bytes_written) == (x.nbytes, x.nbytes)


def test_attention():
    q, k, v = random(4, 256), random(2, 70, 256), random(2, 71, 256)[:, :70].copy()
    run = peers.sdpa(q, k, v, 1 / 16).run(check=True)
    assert not run.result.findings
    scores = np.einsum("hd,htd->ht", q.astype("f8"), np.repeat(k, 2, 0).astype("f8")) / 16
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    assert np.abs(run.y - np.einsum("ht,htd->hd", weights, np.repeat(v, 2, 0))).max() < 2e-6
    heads_per_kv = 2  # this kernel reads keys and values once per query head
    assert run.result.traffic["keys"] == (heads_per_kv * k.nbytes, 0)


def delta_rule(q, k, v, decay, beta, state):
    """The gated delta rule of MLX's kernels in f64: y and the new state."""
    heads, state, out = v.shape[1], state.astype("f8"), []
    q, k = (np.repeat(a, heads // a.shape[1], 1).astype("f8") for a in (q, k))
    for t in range(len(v)):
        state = state * decay[t][:, None, None]
        error = (v[t] - np.einsum("hvk,hk->hv", state, k[t])) * beta[t][:, None]
        state = state + error[:, :, None] * k[t][:, None, :]
        out.append(np.einsum("hvk,hk->hv", state, q[t]))
    return np.array(out), state


@pytest.mark.parametrize("chunk", [0, 8])
def test_gated_delta(chunk):
    tokens, heads = 11, 32
    q, k = (0.09 * random(tokens + i, heads // 2, 128)[i:] for i in range(2))
    v, state = random(tokens, heads, 128), random(heads, 128, 128)
    gates = np.random.default_rng(1).uniform(0.5, 1, (2, tokens, heads)).astype("f4")
    run = peers.gated_delta(q, k, v, *gates, state, chunk=chunk).run(check=True)
    y, after = delta_rule(q, k, v, *gates, state)
    assert np.abs(run.outputs[6] - y).max() < 2e-5
    assert np.abs(run.outputs[7] - after).max() < 2e-5
    # Lanes of a simdgroup write what others read before, with no barrier: lock-step reliance.
    assert {f.kind for f in run.result.findings} == ({"race-write-read"} if chunk else set())
    assert run.result.traffic["state_in"] == (state.nbytes, 0)
    assert run.result.traffic["state_out"] == (0, state.nbytes)
