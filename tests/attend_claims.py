"""Attention of one token over coded pages: what every GPU is tested with, and claims of all.

A test module brings ``token_case``, its `Token`, whose ``run(**options)`` returns
``y[b, 1, h, d]`` and then other things.
"""

from __future__ import annotations

import numpy as np
import pytest

from hadamoe import kv_ops, reference_kv
from hadamoe.kv import CODECS, KVFormat
from hadamoe.verify import kv_cases, kv_rounding
from hadamoe.verify.kv_cases import Shape

OURS = [KVFormat(k, v) for k in kv_cases.OURS for v in kv_cases.OURS]
OTHERS = [codec for codec in CODECS if codec not in kv_cases.OURS]


class Token:
    """A cache that holds ``past`` tokens, one more token, and what attention of it is.

    Attributes:
        layer: the cache before the token; after: with it.
        want: the result and its bound.
    """

    def __init__(self, form: KVFormat, shape: Shape, seed: int = 0):
        rng = np.random.default_rng([seed, CODECS[form.key], CODECS[form.value]])
        self.form, self.shape = form, shape
        self.layer = kv_cases.filled(rng, form, shape, 1)
        self.q, self.k, self.v = kv_cases.tokens(rng, shape, 1)
        self.want, _ = kv_rounding.kv_attend(self.q, self.k, self.v, self.layer, shape.past)
        self.after = reference_kv.copied(self.layer)
        kv_ops.kv_attend(None, self.k, self.v, self.after, shape.past)

    @property
    def proj(self) -> np.ndarray:
        """The token as attention's projection has it, with gates that count heads."""
        b, _, h, d = self.q.shape
        heads = [np.stack([self.q[:, 0], self.gate[:, 0]], 2).reshape(b, 2 * h, d), self.k[:, 0]]
        return np.concatenate([*heads, self.v[:, 0]], 1).reshape(b, 1, -1)

    @property
    def gate(self) -> np.ndarray:
        return np.broadcast_to(np.linspace(-2, 2, self.q.shape[2])[:, None], self.q.shape).astype(
            np.float32
        )


@pytest.mark.parametrize("form", OURS, ids="/".join)
def test_every_pair_of_ours(form, token_case):
    token_case(form, Shape(8, 2, 64, (331, 65), 1)).check(check=True)


def test_gate(token_case):
    case = token_case(KVFormat("h4", "h4"), Shape(8, 2, 64, (200,), 1))
    plain, gated = case.run()[0], case.run(gated=True)[0]
    want = plain / (1 + np.exp(-case.gate.astype(np.float64)))
    assert np.abs(gated - want).max() <= 4e-7 * np.abs(want).max()


@pytest.mark.parametrize("wrong", ["length", "code", "value scale"])
def test_mutants_leave_the_bound(wrong, token_case):
    """The bound sees a token too few, one code of a key that matters, one scale of a value."""
    case = token_case(KVFormat("h4", "h4"), Shape(4, 1, 64, (200,), 1))
    if wrong == "length":
        case.shape = case.shape._replace(past=(199,))
    if wrong == "code":
        case.layer.key_pages[case.layer.table[0, 1]][..., :64] ^= 0x88
    if wrong == "value scale":
        case.layer.value_pages[case.layer.table[0, 1]][..., -127::2] ^= 4
    y = case.run()[0]
    assert (np.abs(y - case.want.value) > case.want.error).any()
