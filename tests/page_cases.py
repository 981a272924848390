"""Rows, queries and pages that a cache's kernels on every GPU are tested with."""

from __future__ import annotations

import numpy as np

from hadamoe import kv_ops
from hadamoe.kv import KEY_SEED, PAGE, page_bytes, signs
from hadamoe.reference_kv import hadamard_sum
from hadamoe.verify import kv_cases


def rows(d: int, seed: int = 0) -> np.ndarray:
    """f32 ``[3, 64, d]``: Gaussian, heavy tails with outlying columns, edge cases."""
    rng = np.random.default_rng([seed, d])
    return np.concatenate([kv_cases.rows_of(rng, kind, 1, d) for kind in kv_cases.ROWS])


def any_codes(pages: np.ndarray, codec: str, d: int) -> np.ndarray:
    """The pages with every code in every place, their scales kept."""
    codes = np.random.default_rng(1).integers(0, 256, pages.shape, dtype=np.uint8)
    if codec == "fp8":
        codes[codes & 127 == 127] = 0  # NaN, which is never stored for a number
    bits = 16 if codec == "bf16" else 8 if codec == "fp8" else int(codec[-1])
    codes[:, PAGE * d * bits // 8 :] = pages[:, PAGE * d * bits // 8 :]
    return codes if codec != "bf16" else pages


def case(
    codec: str, d: int, rows: int, pages: int, kind: str = "gaussian"
) -> tuple[np.ndarray, np.ndarray]:
    """Queries f32 ``[rows, d]`` and pages of keys."""
    rng = np.random.default_rng([d, rows])
    x = kv_cases.rows_of(rng, kind, pages, d)
    q = kv_cases.rows_of(rng, kind, 1, d)[0, :rows]
    return q, kv_ops.kv_encode(x, codec)


def largest(codec: str, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries and pages of which every product is as large as it can be, of one sign."""
    q = hadamard_sum(np.ones((1, d), np.float32)) * signs(d, KEY_SEED)
    pages = np.zeros((2, page_bytes(codec, d)), np.uint8)
    pages[0, :-128] = 255
    return np.concatenate([q, -q]), pages


def one_code_changed() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, a page of h4, and the page with another code."""
    q, pages = case("h4", 64, 8, 1)
    other = pages.copy()
    other[0, 5] ^= 16
    return q, pages, other
