"""Who goes where: the choice of experts, the order of a prompt's pairs, and what is around."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_cases import FRONT, to_numpy, to_torch
from simt import cuda

from hadamoe import cuda_moe
from hadamoe.errors import UnsupportedError

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))


def run(launch, **arrays):
    with cuda.installed(check=True):
        made = FRONT.run(launch, {name: to_torch(a) for name, a in arrays.items()})
    return [to_numpy(a) for a in made]


def route(logits, top_k, normalize=True):
    tokens, experts = logits.shape[0], logits.shape[1] - 1
    return run(cuda_moe.route(tokens, experts, top_k, normalize=normalize), logits=logits)


def expected(logits, top_k, normalize):
    """reference.moe_decode's choice, from logits."""
    wide = logits[:, :-1].astype(np.float64)
    p = np.exp(wide - wide.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    expert = np.argsort(-p, -1, kind="stable")[:, :top_k]
    share = np.take_along_axis(p, expert, -1)
    if normalize:
        share /= share.sum(-1, keepdims=True)
    return expert, np.concatenate([share, 1 / (1 + np.exp(-logits[:, -1:]))], -1)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("experts", "top_k"), [(1, 1), (5, 5), (40, 8), (256, 8), (257, 3), (512, 32)]
)
def test_choice(experts, top_k, normalize):
    rng = np.random.default_rng(experts)
    logits = 3 * rng.standard_normal((5, experts + 1)).astype("f4")
    got, want = route(logits, top_k, normalize), expected(logits, top_k, normalize)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5)


@pytest.mark.parametrize("experts", [33, 256, 500])
def test_equal_logits_take_the_lower_expert(experts):
    logits = np.random.default_rng(1).integers(-1, 2, (4, experts + 1)).astype("f4")
    logits[0, ::2] = -0.0  # equal to 0
    got, want = route(logits, 12), expected(logits, 12, True)
    np.testing.assert_array_equal(got[0], want[0])


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, "all"])
def test_logits_that_are_no_numbers(bad):
    """A token's shares are NaN then, its experts some that exist; no other token notices."""
    logits = np.random.default_rng(2).standard_normal((3, 257)).astype("f4")
    want = route(logits, 8)
    if bad == "all":
        logits[1] = np.uint32([0xFFFFFFFF]).view("f4")
    else:
        logits[1, 17] = bad
    expert, share = route(logits, 8)
    assert np.isnan(share[1, :8]).all()
    assert len(set(expert[1])) == 8
    assert (expert >= 0).all()
    assert (expert < 256).all()
    for got, old in zip((expert, share), want, strict=True):
        np.testing.assert_array_equal(got[[0, 2]], old[[0, 2]])


def test_more_experts_than_a_warp_ranks():
    with pytest.raises(UnsupportedError, match="513 experts, on CUDA 512 at most"):
        cuda_moe.route(1, 513, 8, normalize=True)


@pytest.mark.parametrize(("pairs", "experts"), [(1, 3), (72, 5), (255, 1), (2100, 256)])
def test_order(pairs, experts):
    expert = np.random.default_rng(pairs).integers(0, experts, pairs).astype("i4")
    order, by_expert = run(cuda_moe.order(pairs, experts), expert=expert)
    np.testing.assert_array_equal(order, np.argsort(expert, kind="stable"))
    np.testing.assert_array_equal(by_expert, np.sort(expert))


def test_an_expert_that_is_not_there_is_the_last():
    order, by_expert = run(cuda_moe.order(5, 4), expert=np.int32([7, 0, -1, 3, 2]))
    np.testing.assert_array_equal(order, [1, 4, 0, 2, 3])
    np.testing.assert_array_equal(by_expert, [0, 2, 3, 3, 3])


@pytest.mark.parametrize("width", [1, 96, 512, 2052])
def test_swiglu_and_sum(width):
    rng = np.random.default_rng(width)
    x = rng.standard_normal((5, 2 * width)).astype("f4")
    (y,) = run(cuda_moe.swiglu(5, width), x=x)
    gate, up = np.split(x.astype("f8"), 2, -1)
    np.testing.assert_allclose(y, gate / (1 + np.exp(-gate)) * up, rtol=1e-5, atol=1e-6)

    routed, own, residual = (rng.integers(-9, 9, s).astype("f4") for s in
                             ((3, 2, width), (3, width), (3, width)))  # fmt: skip
    share = np.exp2(rng.integers(-2, 2, (3, 3))).astype("f4")
    want = np.einsum("tsn,ts->tn", routed, share[:, :2]) + share[:, 2:] * own
    arrays = {"routed": routed, "own": own, "share": share}
    (y,) = run(cuda_moe.join(3, width, 2, residual=False), **arrays)
    np.testing.assert_array_equal(y, want)
    (y,) = run(cuda_moe.join(3, width, 2, residual=True), residual=residual, **arrays)
    np.testing.assert_array_equal(y, want + residual)


@pytest.mark.parametrize("schedule", ["descending", "random"])
def test_no_schedule_changes_a_bit(schedule):
    logits = torch.from_numpy(np.random.default_rng(4).standard_normal((9, 257)).astype("f4"))
    launch = cuda_moe.route(9, 256, 8, normalize=True)
    made = []
    for options in ({}, {"schedule": schedule, "seed": 3}):
        with cuda.installed(**options):
            expert, share = FRONT.run(launch, {"logits": logits})
            pairs = {"expert": expert.reshape(-1)}
            made.append([expert, share, *FRONT.run(cuda_moe.order(72, 256), pairs)])
    for a, b in zip(*made, strict=True):
        assert torch.equal(a, b)
