"""Codecs of other software: every instruction set has the bits of the reference."""

from __future__ import annotations

import numpy as np
import pytest

from hadamoe import kv_ops
from hadamoe import reference_kv_peers as peers
from hadamoe.bf16 import from_bf16, to_bf16
from hadamoe.errors import ContractError
from hadamoe.kv import CODECS, page_bytes

PEERS = [c for c in CODECS if c != "bf16" and not c.startswith("h")]
WIDTHS = {"turbo": (64, 128, 256), "affine": (64, 192, 256, 512)}
CASES = [(c, d) for c in PEERS for d in WIDTHS.get(c.rstrip("0123456789"), (32, 96, 256, 512))]


def rows(d: int) -> np.ndarray:
    """f32 ``[6, 64, d]``: Gaussian, heavy tails, edge cases, ties, zeros, no negative number."""
    rng = np.random.default_rng(d)
    x = rng.standard_normal((6, 64, d)).astype(np.float32)
    x[1] *= rng.standard_t(3, (64, d))
    x[1, :, :3] *= 20
    for i, number in enumerate((0, -0.0, 1, -3, 1e-9, 1e-30, 1e4, 1e9, -7e4)):
        x[2, 4 * i : 4 * i + 4] = number
    x[2, 40:44] = 0
    x[2, 40:44, 5] = 7
    x[2, 44:48] *= np.float32(1e-30)
    x[3] = np.round(x[3] * 4) / 8
    x[4] = 0
    x[5] = np.abs(x[5])
    x[5, :, 0] = 0
    x[5, 3, 0] = -0.0
    return x


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize(("codec", "d"), CASES)
def test_equal_to_the_reference_bit_for_bit(isa, codec, d, side):
    for scale in (1.0, 0.5, 0.03) if codec == "fp8" else (1.0,):
        pages = kv_ops.kv_encode(rows(d), codec, side=side, scale=scale)
        assert np.array_equal(pages, peers.kv_encode(rows(d), codec, side=side, scale=scale))
        decoded = kv_ops.kv_decode(pages, codec, d, side=side, scale=scale)
        want = peers.kv_decode(pages, codec, d, side=side, scale=scale)
        assert np.array_equal(decoded.view(np.uint32), want.view(np.uint32))
        assert np.isfinite(decoded).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("n", [8, 64, 256])
def test_unpacking_undoes_packing(bits, n):
    codes = np.random.default_rng(n).integers(0, 1 << bits, (5, n), dtype=np.uint8)
    stream = peers.pack(codes, bits)
    assert stream.shape == (5, n * bits // 8)
    assert np.array_equal(peers.unpack(stream, bits), codes)


def test_a_code_of_three_bits_spills_into_the_next_word():
    codes = np.zeros(32, np.uint8)
    codes[10] = 0b101  # bits 30, 31 and 32
    assert peers.pack(codes, 3).view(np.uint32).tolist() == [1 << 30, 1, 0]


@pytest.mark.parametrize("codec", ["turbo2", "turbo3", "turbo4"])
@pytest.mark.parametrize("d", [32, 96, 512])
def test_turbo_has_codebooks_for_three_widths(codec, d):
    with pytest.raises(ContractError, match=f"head_dim is {d}, {codec} needs 64, 128 or 256"):
        page_bytes(codec, d)


@pytest.mark.parametrize("bits", [4, 8])
def test_affine_codes_are_mlx_quantize(bits):
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
    x = from_bf16(to_bf16(rows(256)))
    with mx.stream(mx.cpu):
        theirs = mx.quantize(mx.array(x.reshape(-1, 256)).astype(mx.bfloat16), 64, bits)
        words, scales, biases = (np.array(a.view(mx.uint32)) for a in theirs)
    mine = peers.affine_encode(x.reshape(-1, 256), bits)
    for a, b in zip(mine, (words, scales.view(np.uint16), biases.view(np.uint16)), strict=True):
        assert np.array_equal(a, b)
