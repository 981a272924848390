"""transformers reads gpt-oss's MXFP4 blocks; we read the same bytes."""

from __future__ import annotations

import numpy as np
import pytest

from hadamoe import Instance, ops
from hadamoe.weight import Part, Weight

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'hadamoe[torch]')")
mxfp4 = pytest.importorskip(
    "transformers.integrations.mxfp4", reason="transformers is not installed"
)


def test_gpt_oss_experts():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 8, 4, 16), np.uint8)
    scales = rng.integers(100, 150, (3, 8, 4), np.uint8)
    theirs = mxfp4.convert_moe_packed_tensors(
        torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32
    )  # experts, columns, rows
    inst = Instance("e2m1", 4, "e8m0")
    parts = tuple(
        (Part(inst, 8, 32, b.reshape(8, -1), s),) for b, s in zip(blocks, scales, strict=True)
    )
    ours = ops.dequantize(Weight(128, parts)).reshape(3, 8, 128)
    np.testing.assert_array_equal(ours, theirs.numpy().transpose(0, 2, 1))
