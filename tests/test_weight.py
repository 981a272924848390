"""Weight.of reads stored arrays as they are; README's examples run."""

from __future__ import annotations

import re

import numpy as np
import pytest
from recorded import ROOT, golden

from hadamoe import ContractError, Weight, ops, reference


def test_words_and_bytes_are_the_same_weight():
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, (3, 8, 16), np.uint32)
    scale, bias = rng.standard_normal((2, 3, 8, 2)).astype(np.float32)
    weight = Weight.of(("linear", 4, "f32"), 128, words, scale, bias)
    same = Weight.of(("linear", 4, "f32"), 128, words.view(np.uint8), scale, bias, group=64)
    assert (weight.experts, weight.rows, weight.parts[0][0].group) == (3, 8, 64)
    assert np.shares_memory(weight.parts[2][0].codes, words)
    np.testing.assert_array_equal(ops.dequantize(weight), reference.dequantize(same, np.arange(24)))


def test_gpt_oss_and_gguf_blocks():
    oss = golden("mxfp4_gptoss")
    e, r, groups, _ = oss["blocks"].shape
    weight = Weight.of(
        ("e2m1", 4, "e8m0"), 32 * groups, oss["blocks"].reshape(e, r, -1), oss["scales"]
    )
    want = oss["dequant_EKR"].transpose(0, 2, 1).reshape(e * r, -1)
    np.testing.assert_array_equal(ops.dequantize(weight), want)
    gguf = golden("mxfp4_gguf_blocks")
    weight = Weight.of(("e2m1_gguf", 4, "e8m0"), 256, gguf["blocks"])
    np.testing.assert_array_equal(ops.dequantize(weight), gguf["dequant"])


@pytest.mark.parametrize(
    ("codes", "scale", "message"),
    [
        ((8,), None, "codes has 1 dimensions, needs 2 or 3"),
        ((8, 4), (4, 2), "scale has shape (4, 2), needs (8,) and groups"),
        ((2, 8, 4), (8, 2), "scale has shape (8, 2), needs (2, 8) and groups"),
    ],
)
def test_shapes_that_do_not_fit(codes, scale, message):
    with pytest.raises(ContractError) as error:
        Weight.of(
            ("linear_signed", 4, "f32"), 8, np.zeros(codes, np.uint8),
            None if scale is None else np.zeros(scale, np.float32),
        )  # fmt: skip
    assert str(error.value) == f"Weight.of: {message}"


def test_readme_examples():
    pytest.importorskip("mlx.core")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names: dict = {}
    for block in blocks:
        if "hadamoe.load" not in block:  # needs a checkpoint; tests/model has it
            exec(block, names)
    assert names["y"].shape == (1, 512)
