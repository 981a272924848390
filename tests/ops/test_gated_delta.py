"""gated_delta: within a derived bound of its meaning, which is transformers' layer."""

from __future__ import annotations

import numpy as np
import pytest
from support import at_page_end

from hadamoe import _cpu, ops, reference
from hadamoe.errors import ContractError
from hadamoe.verify import rounding
from hadamoe.verify.layers import gated_delta_arrays

#: b, t, hk, hv, dk, dv, taps: the model's heads, tails of every vector width, strips over 128.
SHAPES = [
    (1, 4, 1, 2, 128, 128, 4),
    (2, 7, 2, 4, 16, 24, 4),
    (1, 5, 2, 2, 8, 7, 2),
    (3, 2, 1, 3, 5, 150, 3),
    (1, 3, 1, 1, 140, 67, 8),
    (2, 3, 2, 4, 1, 1, 1),
]


def arguments(rng, b, t, hk, hv, dk, dv, taps=4) -> dict[str, np.ndarray]:
    return gated_delta_arrays(rng, b, t, hk, hv, dk, dv, taps)


def run(arrays, shape, *, dtype=None, eps=1e-6):
    """(y, conv_state, state) of the native op; y starts as NaN, inputs end at unmapped pages."""
    (b, t), (hk, hv, dk, dv) = arrays["proj"].shape[:2], shape[2:6]
    y = np.full((b, t, hv * dv), np.nan, dtype or arrays["proj"].dtype)
    inputs = [at_page_end(a) for a in list(arrays.values())[:5]]
    states = [at_page_end(a) for a in list(arrays.values())[5:]]
    _cpu.call("gated_delta", inputs, [y, *states], [hk, hv, dk, dv], [eps])
    return y, *states


def equal(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_within_the_rounding_bound(isa, rng, shape):
    arrays = arguments(rng, *shape)
    y, conv_state, state = run(arrays, shape)
    exact_y, exact_state = rounding.gated_delta(**arrays, hk=shape[2], eps=1e-6)
    meaning = reference.gated_delta(**arrays, hk=shape[2], eps=1e-6)
    assert (np.abs(y - meaning[0]) <= exact_y.error).all()
    assert (np.abs(state - meaning[2]) <= exact_state.error).all()
    assert np.array_equal(conv_state, meaning[1])
    # the bound is about the same expression: its centre is the reference
    assert np.allclose(exact_y.value, meaning[0], rtol=1e-9, atol=1e-12)


def wrong(name, change):
    return pytest.param(name, change, id=f"{name}")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        wrong("proj", lambda a: np.concatenate([a[..., :1] * (1 + 1e-4), a[..., 1:]], -1)),
        wrong("proj", lambda a: np.concatenate([a[..., :-1], a[..., -1:] + 1e-3], -1)),
        wrong("conv_weight", lambda a: a[:, ::-1]),
        wrong("a_log", lambda a: a + np.float32(1e-4)),
        wrong("dt_bias", lambda a: a * 0),
        wrong("norm", lambda a: 1 + a),
        wrong("conv_state", lambda a: np.roll(a, 1, -1)),
        wrong("state", lambda a: a.swapaxes(2, 3)),
    ],
)
def test_a_mutant_leaves_the_bound(rng, name, change):
    shape = (1, 4, 1, 2, 16, 16)
    arrays = arguments(rng, *shape)
    want, _ = rounding.gated_delta(**arrays, hk=1, eps=1e-6)
    arrays[name] = np.ascontiguousarray(change(arrays[name]), np.float32)
    y, _, _ = run(arrays, shape)
    assert not (np.abs(y - want.value) <= want.error).all()


@pytest.mark.parametrize("split", [[1] * 45, [3, 40, 2], [32, 13]])
@pytest.mark.parametrize("heads", [(1, 2, 128, 128), (2, 2, 8, 70)])
def test_one_call_gives_the_bits_of_token_by_token(isa, rng, split, heads):
    shape = (2, 45, *heads)
    arrays = arguments(rng, *shape)
    want = run(arrays, shape)
    outputs, states = [], [arrays["conv_state"], arrays["state"]]
    for start, t in zip(np.cumsum([0, *split]), split, strict=False):
        part = {**arrays, "proj": np.ascontiguousarray(arrays["proj"][:, start : start + t])}
        part["conv_state"], part["state"] = states
        y, *states = run(part, shape)
        outputs.append(y)
    assert equal(want, (np.concatenate(outputs, 1), *states))


def test_a_sequence_does_not_depend_on_its_batch(isa, rng):
    shape = (5, 9, 2, 4, 16, 24)
    arrays = arguments(rng, *shape)
    together = run(arrays, shape)
    for b in range(5):
        per_sequence = {"proj", "conv_state", "state"}
        one = {k: a[b : b + 1] if k in per_sequence else a for k, a in arrays.items()}
        assert equal(run(one, shape), [a[b : b + 1] for a in together])


def test_same_bits_for_any_number_of_threads(isa, rng):
    shape = (2, 40, 2, 4, 32, 40)
    arrays, before = arguments(rng, *shape), ops.threads()
    first = run(arrays, shape)
    for count in (1, 2, 5):
        ops.set_threads(count)
        assert equal(run(arrays, shape), first)
    ops.set_threads(before)


def test_16_bit_proj_widens_exactly_and_y_rounds_once(isa, rng):
    shape = (1, 3, 1, 2, 16, 24)
    arrays = arguments(rng, *shape)
    half = {**arrays, "proj": arrays["proj"].astype(np.float16)}
    wide = {**arrays, "proj": half["proj"].astype(np.float32)}
    y, *states = run(wide, shape)
    assert equal(run(half, shape, dtype=np.float32), (y, *states))
    assert equal(run(half, shape), (y.astype(np.float16), *states))


def test_bf16(isa, rng):
    torch = pytest.importorskip("torch")
    shape = (1, 3, 1, 2, 16, 24)
    arrays = {k: torch.from_numpy(a) for k, a in arguments(rng, *shape).items()}
    arrays["proj"] = arrays["proj"].bfloat16()
    wide = {k: a.float().numpy() for k, a in arrays.items()}
    y = torch.full((1, 3, 48), torch.nan, dtype=torch.bfloat16)
    *inputs, conv_state, state = arrays.values()
    want = run(wide, shape)
    _cpu.call("gated_delta", inputs, [y, conv_state, state], [1, 2, 16, 24], [1e-6])
    assert torch.equal(y, torch.from_numpy(want[0]).bfloat16())
    assert equal((conv_state.numpy(), state.numpy()), want[1:])


def test_saturated_gates_stay_finite(isa, rng):
    """Softplus beyond its threshold, sigmoids at both ends, silu of large numbers, a zero key."""
    shape = (1, 6, 1, 2, 16, 16)
    arrays = arguments(rng, *shape)
    hv, dv = 2, 16
    proj = arrays["proj"]
    proj[0, :, -hv:] = np.array([-200, -20, 19.9, 20.1, 100, 1e4])[:, None]  # a
    proj[0, :, -2 * hv : -hv] = np.array([-200, -50, 0, 50, 100, 200])[:, None]  # b
    proj[0, :, -2 * hv - hv * dv : -2 * hv] = rng.choice([-300, -80, 0, 90, 300], (6, hv * dv))
    arrays["a_log"][:] = (-10, 2.7)
    arrays["conv_weight"][16:32] = 0  # all of k
    want = reference.gated_delta(**arrays, hk=1, eps=1e-6)
    exact_y, exact_state = rounding.gated_delta(**arrays, hk=1, eps=1e-6)
    y, _, state = run(arrays, shape)
    assert (np.abs(y - want[0]) <= exact_y.error).all()
    assert (np.abs(state - want[2]) <= exact_state.error).all()


def test_every_step_of_a_long_prompt_is_within_its_bound(isa, rng):
    """From the kernel's own state before it: a bound over 100 steps would say nothing."""
    shape = (1, 100, 1, 1, 16, 16)
    arrays = arguments(rng, *shape)
    arrays["a_log"][:] = -12  # forgets 1e-5 a step
    whole, *_ = run(arrays, shape)
    step = dict(arrays)
    for i in range(100):
        step["proj"] = np.ascontiguousarray(arrays["proj"][:, i : i + 1])
        y, state = rounding.gated_delta(**step, hk=1, eps=1e-6)
        _, step["conv_state"], step["state"] = run(step, shape)
        assert (np.abs(whole[:, i : i + 1] - y.value) <= y.error).all()
        assert (np.abs(step["state"] - state.value) <= state.error).all()


@pytest.fixture
def layer(monkeypatch):
    """transformers' layer made to compute in f64, its projections taken out."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.qwen3_5_moe import configuration_qwen3_5_moe as configuration
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

    def build(arrays, shape):
        _, _, hk, hv, dk, dv = shape
        c = 2 * hk * dk + hv * dv
        config = configuration.Qwen3_5MoeTextConfig(
            hidden_size=8, linear_num_key_heads=hk, linear_num_value_heads=hv,
            linear_key_head_dim=dk, linear_value_head_dim=dv, rms_norm_eps=1e-6,
        )  # fmt: skip
        net = modeling.Qwen3_5MoeGatedDeltaNet(config, 0).double()
        values = {
            "conv1d.weight": arrays["conv_weight"][:, None],
            "A_log": arrays["a_log"],
            "dt_bias": arrays["dt_bias"],
            "norm.weight": arrays["norm"],
        }
        net.load_state_dict({k: torch.from_numpy(v).double() for k, v in values.items()}, False)

        class Part(torch.nn.Module):
            def __init__(self, begin, end):
                super().__init__()
                self.span = slice(begin, end)

            def forward(self, x):
                return x[..., self.span]

        cuts = np.cumsum([0, c, hv * dv, hv, hv])
        for name, begin, end in zip(("qkv", "z", "b", "a"), cuts, cuts[1:], strict=False):
            setattr(net, f"in_proj_{name}", Part(begin, end))
        net.out_proj = torch.nn.Identity()
        monkeypatch.setattr(torch, "float32", torch.float64)
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return net

    return build


class States:
    """The part of transformers' cache a gated delta layer uses."""

    def __init__(self, conv, recurrent):
        self.conv, self.recurrent = conv, recurrent

    def get_conv_state(self, layer, state_idx=0):
        return self.conv

    def get_recurrent_state(self, layer, state_idx=0):
        return self.recurrent

    def is_recording_past(self, layer):
        return False

    def update_recurrent_state(self, state, layer):
        self.recurrent = state


def test_reference_means_what_transformers_computes_for_a_prompt(rng, layer):
    torch = pytest.importorskip("torch")
    shape = (2, 70, 2, 4, 16, 24)  # 70: more than one of its chunks of 64
    arrays = arguments(rng, *shape)
    arrays["conv_state"][:], arrays["state"][:] = 0, 0
    with torch.no_grad():
        want = layer(arrays, shape)(torch.from_numpy(arrays["proj"]).double())
    y, _, _ = reference.gated_delta(**arrays, hk=2, eps=1e-6)
    assert np.allclose(y, want.numpy(), rtol=1e-9, atol=1e-11)


def test_reference_means_what_transformers_computes_for_a_step(rng, layer):
    torch = pytest.importorskip("torch")
    shape = (2, 1, 2, 4, 16, 24)
    arrays = arguments(rng, *shape)
    names = ("conv_state", "state")
    states = States(*(torch.from_numpy(arrays[n]).double() for n in names))
    with torch.no_grad():
        want = layer(arrays, shape)(torch.from_numpy(arrays["proj"]).double(), states)
    y, conv_state, state = reference.gated_delta(**arrays, hk=2, eps=1e-6)
    assert np.allclose(y, want.numpy(), rtol=1e-12, atol=1e-14)
    assert np.allclose(state, states.recurrent.numpy(), rtol=1e-12, atol=1e-14)
    assert np.array_equal(conv_state, states.conv.numpy())


def test_nothing_to_do(rng):
    shape = (1, 0, 1, 2, 16, 8)
    arrays = arguments(rng, *shape)
    y, conv_state, state = run(arrays, shape)
    assert y.shape == (1, 0, 16)
    assert equal((conv_state, state), (arrays["conv_state"], arrays["state"]))


F = np.float32
BOUND = "[b=2 c=56 h=4 k=8 m=24 t=3 v=6 w=88"  # dimensions known once proj is


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ints": [0, 4, 8, 6]}, "hk is 0, needs 1..1048576"),
        ({"ints": [2, -4, 8, 6]}, "hv is -4, needs 1..1048576"),
        ({"ints": [2, 4, 0, 6]}, "dk is 0, needs 1..1048576"),
        ({"ints": [2, 4, 8, 2**40]}, "dv is 1099511627776, needs 1..1048576"),
        ({"ints": [3, 4, 8, 6]}, "hv is 4, needs a multiple of hk=3"),
        ({"eps": -1.0}, "eps is -1.000000, needs 0 <= eps < 1"),
        ({"eps": np.nan}, "eps is nan, needs 0 <= eps < 1"),
        ({"proj": (2, 3, 87)}, "proj has w=87, needs 88 [b=2 c=56 h=4 k=8 m=24 t=3 v=6 w=88]"),
        ({"proj": (3, 88)}, "proj has 2 dimensions, needs 3 [c=56 h=4 k=8 m=24 v=6 w=88]"),
        ({"proj": np.zeros((2, 3, 88))}, f"proj is f64, needs f32 bf16 f16 {BOUND}]"),
        ({"conv_weight": (55, 4)}, f"conv_weight has c=55, needs 56 {BOUND}]"),
        ({"conv_weight": (56, 9)}, "conv_weight has n=9, needs 1..8 "
         "[b=2 c=56 h=4 k=8 m=24 n=9 t=3 v=6 w=88]"),
        ({"conv_weight": (56, 0)}, "conv_weight has n=0, needs 1..8 "
         "[b=2 c=56 h=4 k=8 m=24 n=0 t=3 v=6 w=88]"),
        ({"a_log": (3,)}, "a_log has h=3, needs 4"),
        ({"a_log": np.zeros(4)}, "a_log is f64, needs f32"),
        ({"dt_bias": (5,)}, "dt_bias has h=5, needs 4"),
        ({"dt_bias": np.zeros(4, np.float16)}, "dt_bias is f16, needs f32"),
        ({"norm": (8,)}, "norm has v=8, needs 6"),
        ({"norm": np.zeros(6, np.int32)}, "norm is i32, needs f32"),
        ({"y": (2, 3, 25)}, "y has m=25, needs 24"),
        ({"y": (2, 2, 24)}, "y has t=2, needs 3"),
        ({"y": np.zeros((2, 3, 24), np.float16)}, "y is f16, needs f32"),
        ({"conv_state": (2, 56, 3)}, "conv_state has n=3, needs 4"),
        ({"conv_state": (1, 56, 4)}, "conv_state has b=1, needs 2"),
        ({"state": (2, 4, 6, 8)}, "state has k=6, needs 8"),
        ({"state": (2, 3, 8, 6)}, "state has h=3, needs 4"),
        ({"state": (1, 4, 8, 6)}, "state has b=1, needs 2"),
        ({"state": np.zeros((2, 4, 8, 6))}, "state is f64, needs f32"),
    ],
)  # fmt: skip
def test_rejects(changes, message):
    shapes = {
        "proj": (2, 3, 88), "conv_weight": (56, 4), "a_log": (4,), "dt_bias": (4,), "norm": (6,),
        "y": (2, 3, 24), "conv_state": (2, 56, 4), "state": (2, 4, 8, 6),
    }  # fmt: skip
    arrays = [
        np.full(s, 7, F) if isinstance(s, tuple) else s
        for s in (changes.get(name, shape) for name, shape in shapes.items())
    ]
    if "[" not in message and {"ints", "eps"}.isdisjoint(changes):
        message += " [b=2 c=56 h=4 k=8 m=24 n=4 t=3 v=6 w=88]"
    before = [a.copy() for a in arrays]
    with pytest.raises(ContractError) as error:
        _cpu.call("gated_delta", arrays[:5], arrays[5:], changes.get("ints", [2, 4, 8, 6]),
                  [changes.get("eps", 1e-6)])  # fmt: skip
    assert str(error.value) == f"gated_delta: {message}"
    assert equal(arrays, before)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_tokens_behind_a_sequences_count_are_not_there(isa, rng, dtype):
    shape, counts = (4, 150, 1, 2, 16, 20, 4), np.array([150, 0, 70, 200])
    arrays = arguments(rng, *shape)
    arrays["proj"] = arrays["proj"].astype(dtype)
    names, y = list(arrays), np.full((4, 150, 40), np.nan, dtype)
    inputs = [at_page_end(arrays[n]) for n in names[:5]]
    states = [at_page_end(arrays[n]) for n in names[5:]]
    _cpu.call("gated_delta", [*inputs, counts], [y, *states], [*shape[2:6]], [1e-6])
    for b, count in enumerate(counts):
        alone = {n: a[b : b + 1] if n in ("proj", *names[5:]) else a for n, a in arrays.items()}
        alone["proj"] = alone["proj"][:, :count]
        want = run(alone, shape)
        assert np.array_equal(y[b, :count], want[0][0])
        assert not y[b, count:].any()
        assert equal([a[b] for a in states], [a[0] for a in want[1:]])
    with pytest.raises(ContractError, match="counts has b=3, needs 4"):
        _cpu.call("gated_delta", [*inputs, counts[1:]], [y, *states], [*shape[2:6]], [1e-6])
