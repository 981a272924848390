"""compressed-tensors packs; we read its words as they are, odd widths included."""

from __future__ import annotations

import numpy as np
import pytest

from hadamoe import Instance
from hadamoe.weight import Part

from .support import check_product, check_values, raw, weight_of

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'hadamoe[torch]')")
helpers = pytest.importorskip(
    "compressed_tensors.compressors.pack_quantized.helpers",
    reason="compressed-tensors is not installed (pip install 'hadamoe[test]')",
)

ROWS = 16


def bf16_bits(a: np.ndarray) -> np.ndarray:
    return torch.from_numpy(a).bfloat16().view(torch.uint16).numpy()


@pytest.mark.parametrize(("columns", "group"), [(256, 32), (256, 128), (40, 40), (43, 43)])
@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric(bits, columns, group):
    rng = np.random.default_rng(bits * columns)
    half = 1 << (bits - 1)
    q = rng.integers(-half, half, (ROWS, columns)).astype(np.int8)
    packed = helpers.pack_to_int32(torch.from_numpy(q), bits)
    assert (helpers.unpack_from_int32(packed, bits, torch.Size(q.shape)).numpy() == q).all()
    scale = bf16_bits((0.1 * rng.standard_normal((ROWS, columns // group))).astype("f4"))
    wide = (scale.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    inst = Instance("linear_signed", bits, "bf16")
    weight = weight_of(Part(inst, ROWS, group, raw(packed.numpy()), scale), columns)
    peer = q * np.repeat(wide, group, axis=1)
    check_values(weight, peer, roundings=0)  # an 8-bit number times a bf16 one is exact in f32
    check_product(weight, peer, rng.standard_normal((3, columns)).astype("f4"))


@pytest.mark.parametrize("bits", [4, 8])
def test_asymmetric(bits):
    """w = scale * (code - zero point) is our linear table with bias = -zero point * scale."""
    rng = np.random.default_rng(bits)
    half, columns, group = 1 << (bits - 1), 256, 32
    q = rng.integers(-half, half, (ROWS, columns)).astype(np.int8)
    zero = rng.integers(-half, half, (ROWS, columns // group)).astype(np.int8)
    packed = helpers.pack_to_int32(torch.from_numpy(q), bits)
    packed_zero = helpers.pack_to_int32(torch.from_numpy(zero), bits, packed_dim=0)
    shape = torch.Size(zero.shape)
    read = helpers.unpack_from_int32(packed_zero, bits, shape, packed_dim=0).numpy()
    bits16 = bf16_bits((0.1 * rng.standard_normal(zero.shape)).astype("f4"))
    scale = (bits16.astype(np.uint32) << 16).view(np.float32)
    bias = -(read.astype(np.float32) + half) * scale
    part = Part(Instance("linear", bits, "f32"), ROWS, group, raw(packed.numpy()), scale, bias)
    weight = weight_of(part, columns)
    peer = (q - np.repeat(zero.astype(np.float64), group, 1)) * np.repeat(
        scale.astype(np.float64), group, 1
    )
    check_values(weight, peer, roundings=1)
    check_product(weight, peer, rng.standard_normal((3, columns)).astype("f4"))
