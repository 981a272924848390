"""Our ops on what a peer wrote, against the numbers the peer's own code reads back."""

from __future__ import annotations

import numpy as np

from hadamoe import Rotation, ops
from hadamoe.verify import bounds, claims, samples
from hadamoe.weight import Part, Weight


def weight_of(part: Part, columns: int, rotation: Rotation | None = None) -> Weight:
    """A weight of one part."""
    return Weight(columns, ((part,),), rotation)


def raw(array: np.ndarray) -> np.ndarray:
    """The bytes of every row, as a `Part` holds codes."""
    return np.ascontiguousarray(array).view(np.uint8).reshape(len(array), -1)


def check_values(weight: Weight, peer: np.ndarray, roundings: int = 2) -> None:
    """`ops.dequantize` equals the peer's numbers; ``roundings`` 0 asks for the same bits."""
    ours = ops.dequantize(weight).astype(np.float64)
    terms = np.abs(samples.values(samples.magnitude(weight))[0])
    wrong = np.abs(ours - peer) - claims.gamma(2 * roundings) * terms
    assert wrong.max() <= 0, (
        f"off by {wrong.max()} at {np.unravel_index(wrong.argmax(), wrong.shape)}"
    )


def check_product(weight: Weight, peer: np.ndarray, x: np.ndarray, unit: float = 0.0) -> None:
    """`ops.qmatmul` against x @ W^T in f64, W being the peer's numbers rounded to ``unit``."""
    y = ops.qmatmul(x, weight).astype(np.float64)
    want = x.astype(np.float64) @ peer.T
    terms = np.abs(x).astype(np.float64) @ np.abs(samples.values(samples.magnitude(weight))[0]).T
    bound = bounds.qmatmul_bound(x, weight, want, "f32") + (claims.gamma(4) + unit) * terms
    wrong = np.abs(y - want) / bound
    assert wrong.max() <= 1, f"{wrong.max():.2f} times the bound"
