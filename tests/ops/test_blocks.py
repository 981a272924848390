"""attention_block, gated_delta_block, moe_block: the bits of the ops they are made of, near f64."""

from __future__ import annotations

import numpy as np
import pytest
from support import at_page_end

from hadamoe import _cpu, ops, reference
from hadamoe.errors import ContractError
from hadamoe.verify import claims, layers

KINDS = ("none", "blocks", "rows")


def distance(a, b) -> float:
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("op", layers.BLOCKS)
def test_a_block_is_its_parts(isa, op):
    for case in layers.block_cases(op):
        claims.check(case)
        claims.check_deterministic(case)


class Rig:
    """Weights and vectors of the three blocks on Gaussian inputs."""

    hidden, heads, kv, d, rot = 96, 4, 2, 24, 8
    delta = (2, 4, 16, 24)  # hk, hv, dk, dv
    eps = 1e-6

    def __init__(self, rng, kind="none", b=2, t=5, past=3, capacity=9):
        self.rng, self.past = rng, past
        hk, hv, dk, dv = self.delta
        self.x = rng.standard_normal((b, t, self.hidden)).astype(np.float32)
        self.norm = rng.uniform(0.5, 1.5, self.hidden).astype(np.float32)
        arrays = layers.attention_arrays(
            rng, b, t, self.heads, self.kv, self.d, self.rot, past, capacity
        )
        self.attention = {k: a for k, a in arrays.items() if k != "proj"}
        arrays = layers.gated_delta_arrays(rng, b, t, *self.delta, 4)
        self.vectors = {k: a for k, a in arrays.items() if k != "proj"}
        inner = self.heads * self.d
        sizes = {"q": 2 * inner, "k": self.kv * self.d, "v": self.kv * self.d}
        self.attention_weights = self.weights(kind, sizes, "o", inner)
        sizes = {"qkv": 2 * hk * dk + hv * dv, "z": hv * dv, "b": hv, "a": hv}
        self.delta_weights = self.weights(kind, sizes, "out", hv * dv)

    def weights(self, kind, sizes, last, inner):
        first, second = layers.rotations(self.rng, kind, self.hidden, inner)
        made = {n: layers.block_weight(self.rng, k, self.hidden, first) for n, k in sizes.items()}
        return made | {last: layers.block_weight(self.rng, self.hidden, inner, second)}

    def tokens(self, begin, end):
        """The same rig with these tokens alone."""
        part = Rig.__new__(Rig)
        part.__dict__ |= self.__dict__
        part.x = np.ascontiguousarray(self.x[:, begin:end])
        part.past = self.past + begin
        part.attention = dict(self.attention)
        for name in ("cos", "sin"):
            part.attention[name] = np.ascontiguousarray(self.attention[name][:, begin:end])
        return part

    def run_attention(self, caches=None, mask=None):
        """(y, keys, values); caches are left as they were."""
        vectors = [a.copy() for a in self.attention.values()]
        if caches:
            vectors[-2:] = [a.copy() for a in caches]
        packed = ops.AttentionWeights.of(**self.attention_weights)
        options = {"past": self.past, "eps": self.eps, "mask": mask}
        y = ops.attention_block(self.x, self.norm, packed, *vectors, **options)
        return y, *vectors[-2:]

    def run_delta(self, states=None, mask=None):
        """(y, conv_state, state)"""
        vectors = [a.copy() for a in self.vectors.values()]
        if states:
            vectors[-2:] = [a.copy() for a in states]
        packed = ops.DeltaWeights.of(**self.delta_weights)
        heads = {"heads": self.delta[:2], "head_dims": self.delta[2:]}
        y = ops.gated_delta_block(
            self.x, self.norm, packed, *vectors, **heads, eps=self.eps, mask=mask
        )
        return y, *vectors[-2:]


@pytest.mark.parametrize("kind", KINDS)
def test_near_the_reference(isa, rng, kind):
    rig = Rig(rng, kind)
    want = reference.attention_block(
        rig.x, rig.norm, rig.attention_weights, *rig.attention.values(), heads=4, past=3
    )
    got = rig.run_attention()
    assert all(distance(a, b) < 3e-6 for a, b in zip(got, want, strict=True))
    for mutant in (want[0] - rig.x, rig.x * 2):  # no residual; no block
        assert distance(got[0], mutant) > 1e-2
    want = reference.gated_delta_block(
        rig.x, rig.norm, rig.delta_weights, *rig.vectors.values(), hk=2
    )
    got = rig.run_delta()
    assert all(distance(a, b) < 1e-5 for a, b in zip(got, want, strict=True))
    assert distance(got[0], want[0] - rig.x) > 1e-2


def test_moe_block_near_the_reference(isa, rng):
    hidden, inner = 96, 64
    sizes = {
        "router": (5, hidden, 1), "gate_up": (2 * inner, hidden, 5), "down": (hidden, inner, 5),
        "shared_gate_up": (2 * inner, hidden, 1), "shared_down": (hidden, inner, 1),
        "shared_gate": (1, hidden, 1),
    }  # fmt: skip
    moe = {
        name: layers.block_weight(rng, n, k, None, experts=e) for name, (n, k, e) in sizes.items()
    }
    x = rng.standard_normal((4, hidden)).astype(np.float32)
    norm = rng.uniform(0.5, 1.5, hidden).astype(np.float32)
    y = ops.moe_block(x, norm, ops.MoeWeights.of(**moe), top_k=2)
    want = reference.moe_block(x, norm, moe, top_k=2)
    assert distance(y, want) < 3e-6
    assert distance(y, reference.moe_block(x, norm * 0 + 1, moe, top_k=2)) > 1e-3


@pytest.mark.parametrize("split", [[1] * 40, [3, 36, 1]])
def test_a_prompt_cut_anywhere_gives_the_same_bits(isa, rng, split):
    rig = Rig(rng, "rows", t=40, past=110, capacity=150)
    whole, whole_delta = rig.run_attention(), rig.run_delta()
    ys, deltas, caches, states, at = [], [], None, None, 0
    for t in split:
        part = rig.tokens(at, at + t)
        y, *caches = part.run_attention(caches)
        ys.append(y)
        y, *states = part.run_delta(states)
        deltas.append(y)
        at += t
    for want, got in ((whole, (np.concatenate(ys, 1), *caches)),
                      (whole_delta, (np.concatenate(deltas, 1), *states))):  # fmt: skip
        assert all(np.array_equal(a, b) for a, b in zip(want, got, strict=True))


def test_more_tokens_than_one_batch_in_several_sequences(rng):
    """512 tokens at a time: rows of several sequences are gathered and put back."""
    rig = Rig(rng, t=300, past=0, capacity=300)
    together, delta = rig.run_attention(), rig.run_delta()
    begin, end = rig.tokens(0, 130), rig.tokens(130, 300)
    first, *caches = begin.run_attention()
    assert np.array_equal(together[0], np.concatenate([first, end.run_attention(caches)[0]], 1))
    first, *states = begin.run_delta()
    assert np.array_equal(delta[0], np.concatenate([first, end.run_delta(states)[0]], 1))


def test_a_masked_token_leaves_the_state_alone(rng):
    rig = Rig(rng, b=1, t=6)
    mask = np.array([[False, False, True, True, True, True]])
    rig.vectors["conv_state"][:], rig.vectors["state"][:] = 0, 0
    y, *states = rig.run_delta(mask=mask)
    want, *want_states = rig.tokens(2, 6).run_delta()
    assert np.array_equal(y[:, 2:], want)
    assert np.array_equal(y[:, :2], rig.x[:, :2])
    assert all(np.array_equal(a, b) for a, b in zip(states, want_states, strict=True))


def test_masked_tokens_at_the_end_leave_the_states_as_they_are(isa, rng):
    """Sequences of a padded prompt end with the states they have alone."""
    rig, counts = Rig(rng, b=3, t=300), (300, 257, 0)
    mask = np.arange(300) < np.array(counts)[:, None]
    y, *states = rig.run_delta(mask=mask)
    for b, count in enumerate(counts):
        alone = rig.tokens(0, count)
        alone.x = alone.x[b : b + 1]
        alone.vectors = dict(rig.vectors)
        for name in ("conv_state", "state"):
            alone.vectors[name] = rig.vectors[name][b : b + 1]
        want, *want_states = alone.run_delta()
        assert np.array_equal(y[b, :count], want[0])
        assert np.array_equal(y[b, count:], rig.x[b, count:])
        assert all(np.array_equal(a[b], w[0]) for a, w in zip(states, want_states, strict=True))
    meant = reference.gated_delta_block(
        rig.x, rig.norm, rig.delta_weights, *rig.vectors.values(), hk=rig.delta[0], mask=mask
    )
    assert all(distance(a, b) < 3e-6 for a, b in zip((y, *states), meant, strict=True))


def test_no_tokens(rng):
    rig = Rig(rng).tokens(2, 2)
    assert rig.run_attention()[0].shape == (2, 0, 96)
    assert rig.run_delta()[0].shape == (2, 0, 96)


def attention_arguments(rig, **changes):
    """(inputs, outputs, ints, floats) of the native op, arrays at page ends."""
    packed = ops.AttentionWeights.of(**rig.attention_weights)
    signs, tables, ints = packed.arguments(rig.past)
    cos, sin, keys, values = (rig.attention[n] for n in ("cos", "sin", "keys", "values"))
    names = ("x", "cos", "sin", "mask", "norm")
    inputs = dict(zip(names, (rig.x, cos, sin, None, rig.norm), strict=True))
    inputs |= dict(
        zip(("hidden_pre", "hidden_post", "inner_pre", "inner_post"), signs, strict=True)
    )
    inputs |= {n: rig.attention[n] for n in ("q_norm", "k_norm")}
    inputs |= dict(zip("qkvo", tables, strict=True))
    outputs = {"y": np.full_like(rig.x, np.nan), "keys": keys.copy(), "values": values.copy()}
    ints = dict(zip(("past", "hidden_block", "inner_block", "rotated"), ints, strict=True))
    for group in (inputs, outputs, ints):
        group |= {k: v for k, v in changes.items() if k in group}
    ended = [None if a is None else at_page_end(a) for a in inputs.values()]
    return [*ended, *packed.buffers], list(outputs.values()), list(ints.values()), [1e-6]


def test_a_bound_op_is_the_op(rng):
    rig = Rig(rng, "rows")
    inputs, outputs, ints, floats = attention_arguments(rig)
    _cpu.call("attention_block", inputs, outputs, ints, floats)
    fixed = [... if i < 4 else a for i, a in enumerate(inputs)]
    bound = _cpu.Bound("attention_block", fixed, 3, [..., *ints[1:]], floats)
    assert bound.op == "attention_block"
    _, again, _, _ = attention_arguments(rig)
    inputs[11][:] = 0  # its own copy of q's table
    bound(inputs[:4], again, ints[:1])
    assert all(np.array_equal(a, b) for a, b in zip(outputs, again, strict=True))
    with pytest.raises(ContractError, match=r"^attention_block: x has k=95, needs 96"):
        bound([rig.x[..., :95].copy(), *inputs[1:4]], again, ints[:1])
    with pytest.raises(ContractError, match="has 3 inputs, 3 outputs and 1 ints left, needs 4, 3"):
        bound(inputs[:3], again, ints[:1])
    with pytest.raises(ContractError, match="input 1 is list, needs an array"):
        bound([rig.x, [1], *inputs[2:4]], again, ints[:1])
    with pytest.raises(ContractError, match=r"^attention_block: norm has 2 dimensions"):
        _cpu.Bound("attention_block", [*fixed[:4], rig.x[0], *fixed[5:]], 3, [..., -1, -1, 0], [0])
    with pytest.raises(ValueError, match="hadamard cannot be bound"):
        _cpu.Bound("hadamard", [], 1, [], [])


F = np.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((2, 5, 95), F)}, "x has k=95, needs 96"),
        ({"x": np.zeros((2, 5, 96))}, "x is f64, needs f32"),
        ({"norm": np.zeros(0, F)}, "norm has k=0, needs at least 1"),
        ({"norm": np.zeros(96)}, "norm is f64, needs f32"),
        ({"q_norm": np.zeros(25, F)}, "q has 192 rows, needs a multiple of 50"),
        ({"y": np.zeros((2, 4, 96), F)}, "y has t=4, needs 5"),
        ({"keys": np.zeros((2, 3, 9, 24), F)}, "keys has g=3, needs 2"),
        ({"past": 5}, "past is 5, needs 0..4 for 5 tokens in a cache of 9"),
        ({"rotated": 16}, "rotated is 16, needs 0..15"),
        ({"rotated": 1}, "rotated names readers of x, but hidden_block is -1"),
        ({"rotated": 8}, "rotated names readers of the inner state, but inner_block is -1"),
        ({"hidden_block": 3}, "hidden_block is 3, needs 0 or a power of two up to 16384"),
        ({"q": np.zeros((1, 1, 12), np.int64)}, "q[0] has 0 rows, needs at least 1"),
        ({"cos": np.zeros((2, 5, 26), F), "sin": np.zeros((2, 5, 26), F)}, "cos has r=26, needs"),
    ],
)  # fmt: skip
def test_attention_block_rejects(rng, changes, message):
    inputs, outputs, ints, floats = attention_arguments(Rig(rng), **changes)
    before = [o.copy() for o in outputs]
    with pytest.raises(ContractError) as error:
        _cpu.call("attention_block", inputs, outputs, ints, floats)
    assert str(error.value).startswith(f"attention_block: {message}"), str(error.value)
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(before, outputs, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((0, np.zeros((2, 5, 95), F)), "x has x=95, needs 96"),
        ((1, np.ones((2, 4), bool)), "mask has t=4, needs 5"),
        ((1, np.ones((2, 5), F)), "mask is f32, needs bool u8"),
        ((2, np.zeros(95, F)), "qkv[0,0] has row_bytes=48, needs"),
        ((8, np.zeros(3, F)), "a_log has h=3, needs 4"),
        ((11, None), "qkv is not [experts, parts, 12]"),
    ],
)
def test_gated_delta_block_rejects(rng, change, message):
    rig = Rig(rng)
    packed = ops.DeltaWeights.of(**rig.delta_weights)
    signs, tables, ints = packed.arguments(*rig.delta)
    *vectors, conv, state = rig.vectors.values()
    inputs = [rig.x, None, rig.norm, *signs, *vectors, *tables, *packed.buffers]
    inputs[change[0]] = change[1]
    if change[0] == 2:
        inputs[2] = np.zeros(128, F)
    outputs = [np.full_like(rig.x, 77), conv.copy(), state.copy()]
    with pytest.raises(ContractError) as error:
        _cpu.call("gated_delta_block", inputs, outputs, ints, [1e-6])
    assert str(error.value).startswith(f"gated_delta_block: {message}"), str(error.value)
    assert (outputs[0] == 77).all()


def test_roles_are_checked(rng):
    rig = Rig(rng)
    weights = rig.attention_weights
    with pytest.raises(ContractError, match=r"AttentionWeights.of: has \['o', 'q'\], needs"):
        ops.AttentionWeights.of(q=weights["q"], o=weights["o"])
    wrong = weights | {"o": layers.block_weight(rng, 96, 64, None)}
    with pytest.raises(ContractError, match=r"AttentionWeights.of: o has k=64, needs 96"):
        ops.AttentionWeights.of(**wrong)
    first, _ = layers.rotations(rng, "rows", 96, 96)
    second, _ = layers.rotations(rng, "rows", 96, 96)
    two = {
        "q": layers.block_weight(rng, 192, 96, first),
        "k": layers.block_weight(rng, 48, 96, second),
    }
    with pytest.raises(ContractError, match="different rotations"):
        ops.AttentionWeights.of(**weights | two)
