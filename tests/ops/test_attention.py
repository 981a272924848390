"""attention: within a derived bound of its meaning, which is transformers' layer; one query, one
result, however it is asked for."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from support import at_page_end

from hadamoe import _cpu, ops, reference
from hadamoe.errors import ContractError
from hadamoe.verify import claims, layers, rounding

SHAPES = [*layers.ATTENTIONS, (1, 9, 5, 5, 40, 2, 250, 260), (2, 40, 16, 1, 16, 8, 100, 140)]


def run(arrays, heads, past, mask=None, *, dtype=None, eps=1e-6):
    """(y, keys, values) of the native op; y starts as NaN, inputs end at unmapped pages."""
    proj, d = arrays["proj"], arrays["q_norm"].shape[0]
    y = np.full((*proj.shape[:2], heads * d), np.nan, dtype or proj.dtype)
    inputs = [at_page_end(arrays[n]) for n in ("proj", "q_norm", "k_norm", "cos", "sin")]
    inputs.append(None if mask is None else at_page_end(mask))
    caches = [at_page_end(arrays[n]) for n in ("keys", "values")]
    _cpu.call("attention", inputs, [y, *caches], [heads, past], [eps])
    return y, *caches


def equal(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_within_the_rounding_bound(isa, rng, shape, padded):
    b, t, heads, *_, past, capacity = shape
    arrays = layers.attention_arrays(rng, *shape)
    mask = layers.padding(rng, b, t, past, capacity) if padded else None
    options = {"heads": heads, "past": past, "mask": mask, "eps": 1e-6}
    meaning = reference.attention(**arrays, **options)
    bound = rounding.attention(**arrays, **options)
    for got, want, allowed in zip(run(arrays, heads, past, mask), meaning, bound, strict=True):
        assert (np.abs(got - want) <= allowed.error).all()
        assert np.allclose(allowed.value, want, rtol=1e-9, atol=1e-12)


def test_exact_where_nothing_rounds(isa):
    claims.check(layers.exact_attention_case())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("proj", lambda a: a * np.float32(1 + 1e-3)),  # moves values, not normed q and k
        ("q_norm", lambda a: a * np.float32(1 + 1e-3)),
        ("k_norm", lambda a: a[::-1]),
        ("cos", lambda a: -a),
        ("sin", lambda a: -a),
        ("keys", lambda a: np.roll(a, 1, 2)),
        ("values", lambda a: np.roll(a, 1, 2)),
    ],
)
def test_a_mutant_leaves_the_bound(rng, name, change):
    shape = (1, 4, 4, 2, 16, 8, 9, 13)
    arrays = layers.attention_arrays(rng, *shape)
    want = rounding.attention(**arrays, heads=4, past=9, mask=None, eps=1e-6)[0]
    arrays[name] = np.ascontiguousarray(change(arrays[name]), np.float32)
    assert not (np.abs(run(arrays, 4, 9)[0] - want.value) <= want.error).all()


@pytest.mark.parametrize("mutant", ["a key too many", "a key too few", "heads in another order"])
def test_wrong_keys_leave_the_bound(rng, mutant):
    arrays = layers.attention_arrays(rng, 1, 3, 4, 2, 16, 8, 20, 24)
    want = rounding.attention(**arrays, heads=4, past=20, mask=None, eps=1e-6)[0]
    limit = {"a key too many": 1, "a key too few": -1}.get(mutant, 0)
    mask = np.arange(24) <= limit + 20 + np.arange(3)[:, None]
    if not limit:
        arrays["proj"] = np.roll(arrays["proj"].reshape(1, 3, -1, 16), 2, 2).reshape(1, 3, -1)
    y = reference.attention(**arrays, heads=4, past=20, mask=mask[None] & True, eps=1e-6)[0]
    assert not (np.abs(y - want.value) <= want.error).all()


@pytest.mark.parametrize("cache", [np.float32, np.float16])
@pytest.mark.parametrize("split", [[1] * 300, [7, 128, 100, 65], [299, 1]])
def test_a_prompt_cut_anywhere_gives_the_same_bits(isa, rng, split, cache):
    """300 tokens, three blocks of keys; one token is split over threads along its keys."""
    heads, kv, d = 4, 2, 32
    arrays = layers.attention_arrays(rng, 2, 300, heads, kv, d, 8, 0, 300)
    arrays["keys"], arrays["values"] = (arrays[n].astype(cache) for n in ("keys", "values"))
    want = run(arrays, heads, 0)
    outputs, caches, past = [], (arrays["keys"], arrays["values"]), 0
    for t in split:
        part = dict(arrays, keys=caches[0], values=caches[1])
        for name in ("proj", "cos", "sin"):
            part[name] = np.ascontiguousarray(arrays[name][:, past : past + t])
        y, *caches = run(part, heads, past)
        outputs.append(y)
        past += t
    assert equal(want, (np.concatenate(outputs, 1), *caches))


def test_more_tokens_than_one_batch(rng):
    arrays = layers.attention_arrays(rng, 1, 530, 2, 1, 16, 4, 0, 530)
    want = reference.attention(**arrays, heads=2)[0]
    assert np.abs(run(arrays, 2, 0)[0] - want).max() < 1e-5


def test_same_bits_for_any_number_of_threads(isa, rng):
    before = ops.threads()
    try:
        for shape in ((1, 1, 8, 2, 32, 8, 500, 501), (2, 90, 4, 2, 32, 8, 60, 150)):
            arrays = layers.attention_arrays(rng, *shape)
            first = run(arrays, shape[2], shape[6])
            for count in (1, 2, 3, 8):
                ops.set_threads(count)
                assert equal(run(arrays, shape[2], shape[6]), first)
    finally:
        ops.set_threads(before)


def test_a_sequence_does_not_depend_on_its_batch(isa, rng):
    arrays = layers.attention_arrays(rng, 3, 5, 4, 2, 24, 8, 130, 135)
    together = run(arrays, 4, 130)
    for b in range(3):
        norms = {"q_norm", "k_norm"}
        one = {k: a if k in norms else a[b : b + 1] for k, a in arrays.items()}
        assert equal(run(one, 4, 130), [a[b : b + 1] for a in together])


def test_padding_in_front_changes_no_bit(isa, rng):
    """The same tokens with 37 padded ones before them, whose keys and values are anything."""
    heads, t, pad = 4, 150, 37
    arrays = layers.attention_arrays(rng, 1, t + pad, heads, 2, 24, 8, 0, t + pad)
    rest = {
        k: np.ascontiguousarray(a[:, pad:]) if k in ("proj", "cos", "sin") else a
        for k, a in arrays.items()
    }
    rest["keys"], rest["values"] = (np.zeros((1, 2, t, 24), np.float32) for _ in range(2))
    mask = np.tri(t + pad, dtype=bool)[None]
    mask[:, :, :pad] = False
    y, keys, values = run(arrays, heads, 0, mask)
    assert equal((y[:, pad:], keys[:, :, pad:], values[:, :, pad:]), run(rest, heads, 0))
    assert (y[:, :pad] == 0).all()
    last = {k: a[:, -1:] if k in ("proj", "cos", "sin") else a for k, a in arrays.items()}
    last = {k: np.ascontiguousarray(a) for k, a in last.items()} | {"keys": keys, "values": values}
    assert np.array_equal(run(last, heads, t + pad - 1, mask[:, -1:].copy())[0], y[:, -1:])


def test_16_bit_proj_widens_exactly_and_y_rounds_once(isa, rng):
    arrays = layers.attention_arrays(rng, 2, 3, 4, 2, 24, 8, 4, 8)
    half = {**arrays, "proj": arrays["proj"].astype(np.float16)}
    wide = {**arrays, "proj": half["proj"].astype(np.float32)}
    y, *caches = run(wide, 4, 4)
    assert equal(run(half, 4, 4, dtype=np.float32), (y, *caches))
    assert equal(run(half, 4, 4), (y.astype(np.float16), *caches))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_caches_round_once_and_widen_exactly(isa, rng, dtype):
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, dtype)
    arrays = layers.attention_arrays(rng, 1, 3, 4, 2, 24, 8, 200, 203)
    tensors = {k: torch.from_numpy(a.copy()) for k, a in arrays.items()}
    for name in ("keys", "values"):
        tensors[name] = tensors[name].to(dtype)
        arrays[name] = tensors[name].float().numpy()
    y = torch.full((1, 3, 96), torch.nan)
    *inputs, keys, values = tensors.values()
    _cpu.call("attention", [*inputs, None], [y, keys, values], [4, 200], [1e-6])
    _, new_keys, new_values = run(arrays, 4, 200)
    assert torch.equal(keys[:, :, 200:], torch.from_numpy(new_keys[:, :, 200:]).to(dtype))
    assert torch.equal(values[:, :, 200:], torch.from_numpy(new_values[:, :, 200:]).to(dtype))
    # from the rounded caches on, the same numbers
    rounded = dict(arrays, keys=keys.float().numpy(), values=values.float().numpy())
    rounded["proj"] = arrays["proj"][:, 2:].copy()
    rounded["cos"], rounded["sin"] = (arrays[n][:, 2:].copy() for n in ("cos", "sin"))
    want = reference.attention(**rounded, heads=4, past=202)[0]
    assert np.abs(y.numpy()[:, 2:] - want).max() < 2e-2


def test_nothing_to_do(rng):
    arrays = layers.attention_arrays(rng, 1, 0, 2, 1, 8, 4, 3, 5)
    assert run(arrays, 2, 3)[0].shape == (1, 0, 16)


def test_reference_means_what_transformers_computes(rng):
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.models.qwen3_5_moe.modeling_qwen3_5_moe")
    from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig

    heads, kv, d, t = 4, 2, 16, 6
    arrays = layers.attention_arrays(rng, 2, t, heads, kv, d, 8, 0, t)
    config = Qwen3_5MoeTextConfig(
        hidden_size=8, num_attention_heads=heads, num_key_value_heads=kv, head_dim=d,
        rms_norm_eps=1e-6,
    )  # fmt: skip
    config._attn_implementation = "eager"
    layer = hf.Qwen3_5MoeAttention(config, 0).double()

    class Columns(torch.nn.Module):
        def __init__(self, begin, end):
            super().__init__()
            self.at = slice(begin, end)

        def forward(self, x):
            return x[..., self.at]

    ends = np.cumsum([0, 2 * heads * d, kv * d, kv * d])
    layer.q_proj, layer.k_proj, layer.v_proj = (Columns(a, b) for a, b in pairwise(ends))
    layer.o_proj = torch.nn.Identity()
    for name in ("q_norm", "k_norm"):
        getattr(layer, name).weight.data = torch.from_numpy(arrays[name]).double() - 1
    mask = torch.full((t, t), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    proj, cos, sin = (torch.from_numpy(arrays[n]).double() for n in ("proj", "cos", "sin"))
    with torch.no_grad():
        want, _ = layer(proj, (cos, sin), mask)
    y = reference.attention(**arrays, heads=heads)[0]
    assert np.allclose(y, want.numpy(), rtol=0, atol=1e-6)  # its norms and softmax are f32


DIMS = "[b=2 c=9 d=8 g=2 r=4 t=3 w=96]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proj": (2, 3, 95)}, "proj has w=95, needs 96 [b=2 c=9 d=8 g=2 r=4 t=3 w=95]"),
        ({"proj": (6, 96)}, "proj has 2 dimensions, needs 3"),
        ({"proj": np.zeros((2, 3, 96))}, "proj is f64, needs f32 bf16 f16 [b=2 t=3 w=96]"),
        ({"q_norm": (0,), "k_norm": (0,)}, "q_norm has d=0, needs 1..512 [b=2 d=0 t=3 w=96]"),
        ({"q_norm": (513,), "k_norm": (513,)},
         "q_norm has d=513, needs 1..512 [b=2 d=513 t=3 w=96]"),
        ({"k_norm": (7,)}, "k_norm has d=7, needs 8 [b=2 d=8 t=3 w=96]"),
        ({"q_norm": np.zeros(8)}, "q_norm is f64, needs f32 [b=2 d=8 t=3 w=96]"),
        ({"cos": (2, 3, 3), "sin": (2, 3, 3)},
         "cos has r=3, needs an even number up to 8 [b=2 d=8 r=3 t=3 w=96]"),
        ({"cos": (2, 3, 10), "sin": (2, 3, 10)},
         "cos has r=10, needs an even number up to 8 [b=2 d=8 r=10 t=3 w=96]"),
        ({"sin": (2, 2, 4)}, "sin has t=2, needs 3 [b=2 d=8 r=4 t=3 w=96]"),
        ({"cos": np.zeros((2, 3, 4))}, "cos is f64, needs f32 [b=2 d=8 r=4 t=3 w=96]"),
        ({"mask": np.ones((2, 3, 5), bool)},
         "mask has n=5, needs at least 7 [b=2 c=9 d=8 g=2 n=5 r=4 t=3 w=96]"),
        ({"mask": np.ones((2, 2, 9), bool)},
         f"mask has t=2, needs 3 {DIMS}"),
        ({"mask": np.ones((2, 3, 9), np.int64)},
         "mask is i64, needs bool u8 [b=2 c=9 d=8 g=2 n=9 r=4 t=3 w=96]"),
        ({"keys": (2, 2, 9, 7)}, "keys has d=7, needs 8 [b=2 c=9 d=8 g=2 r=4 t=3 w=96]"),
        ({"values": (2, 2, 8, 8)}, f"values has c=8, needs 9 {DIMS}"),
        ({"values": np.zeros((2, 2, 9, 8), np.float16)}, f"values is f16, needs f32 {DIMS}"),
        ({"keys": np.zeros((2, 2, 9, 8))}, f"keys is f64, needs f32 bf16 f16 {DIMS}"),
        ({"heads": 3}, f"heads is 3, needs a multiple of g=2 {DIMS}"),
        ({"heads": 0}, f"heads is 0, needs a multiple of g=2 {DIMS}"),
        ({"past": -1}, f"past is -1, needs 0..6 for 3 tokens in a cache of 9 {DIMS}"),
        ({"past": 7}, f"past is 7, needs 0..6 for 3 tokens in a cache of 9 {DIMS}"),
        ({"eps": 1.0}, f"eps is 1.000000, needs 0 <= eps < 1 {DIMS}"),
        ({"y": (2, 3, 31)}, "y has m=31, needs 32 [b=2 c=9 d=8 g=2 m=32 r=4 t=3 w=96]"),
        ({"y": np.zeros((2, 3, 32), np.float16)},
         "y is f16, needs f32 [b=2 c=9 d=8 g=2 m=32 r=4 t=3 w=96]"),
    ],
)  # fmt: skip
def test_rejects(changes, message):
    shapes = {
        "proj": (2, 3, 96), "q_norm": (8,), "k_norm": (8,), "cos": (2, 3, 4), "sin": (2, 3, 4),
        "mask": None, "y": (2, 3, 32), "keys": (2, 2, 9, 8), "values": (2, 2, 9, 8),
    }  # fmt: skip
    arrays = [
        np.zeros(a, np.float32) if isinstance(a, tuple) else a
        for a in (changes.get(name, shape) for name, shape in shapes.items())
    ]
    for out in arrays[6:]:
        out.fill(77)
    ints = [changes.get("heads", 4), changes.get("past", 4)]
    with pytest.raises(ContractError) as error:
        _cpu.call("attention", arrays[:6], arrays[6:], ints, [changes.get("eps", 1e-6)])
    text = str(error.value)
    assert text.startswith(f"attention: {message}"), text
    assert all((out == 77).all() for out in arrays[6:])
