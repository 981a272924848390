"""Sign vectors and codebooks, bit for bit the ones the formats' own tools use."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from recorded import golden

from hadamoe.constants import jangtq_codebook, jangtq_signs, tq_codebook, tq_signs


def test_every_recorded_jangtq_table():
    """Recorded from jang 2.5.50."""
    for name, want in golden("jangtq_codebooks_signs").items():
        kind, columns, last = name.split(".")
        make = jangtq_codebook if kind == "codebook" else jangtq_signs
        np.testing.assert_array_equal(make(int(columns), int(last)), want, err_msg=name)


@pytest.mark.parametrize("seed", [0, 7, 42, 2**40])
def test_jangtq_signs_are_numpys_choice(seed):
    """jang calls this; hadamoe's closed form over raw PCG64 words does not depend on numpy's "
    "choice."""
    want = np.random.default_rng(seed).choice([-1.0, 1.0], size=771)
    np.testing.assert_array_equal(jangtq_signs(771, seed), want)
    np.testing.assert_array_equal(jangtq_signs(512, seed), want[:512])


def test_jangtq_signs_of_the_published_model():
    bits = np.packbits(jangtq_signs(2048) > 0, bitorder="little").tobytes()
    assert hashlib.sha256(bits).hexdigest().startswith("a63cb9db9a66142bfb0a83a4d7d272d0")


@pytest.mark.parametrize(
    ("columns", "bits", "half"),
    [
        (2048, 2, "3c262852 3d0a0982"),
        (512, 2, "3ca4d272 3d892ac8"),
        (512, 4, "3bc9e6c4 3c976d0c 3cfde5c3 3d347f7e 3d6e93cd 3d985fa7 3dc10e53 3dfc3a63"),
    ],
)
def test_jangtq_codebook_bits(columns, bits, half):
    table = jangtq_codebook(columns, bits)
    assert " ".join(f"{v:08x}" for v in table[len(table) // 2 :].view(np.uint32)) == half
    np.testing.assert_array_equal(table, -table[::-1])


def test_tq_signs_masks():
    """MT19937 seeded 42: bit i of word w is set where sign 32 w + i is plus."""
    masks = [
        [f"{w:08x}" for w in np.packbits(s > 0, bitorder="little").view("<u4")] for s in tq_signs()
    ]
    assert masks == [
        ["3fd74222", "01ab7c17", "ff4abaf6", "656b5fe7"],
        ["a821d007", "2440e65c", "c501d238", "1425bfcb"],
    ]


def test_tq_codebooks():
    np.testing.assert_array_equal(
        tq_codebook(2)[2:], np.float32([0.040039923, 0.133466408]), strict=True
    )
    assert [len(tq_codebook(b)) for b in (2, 3, 4)] == [4, 8, 16]
    for bits in (2, 3, 4):
        assert (np.diff(tq_codebook(bits)) > 0).all()
    assert f"{tq_codebook(4)[-1].view(np.uint32):08x}" == "3e75ed5a"
    assert f"{tq_codebook(3)[4].view(np.uint32):08x}" == "3cb1778c"
