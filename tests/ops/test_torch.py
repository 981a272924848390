"""The ops on torch tensors: numpy's bits, torch.library's rules, and one fullgraph compile."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.library import opcheck  # noqa: E402
from torch_calls import (  # noqa: E402
    HEAD_DIMS,
    HEADS,
    E,
    K,
    N,
    Small,
    delta_arrays,
    half_calls,
    moe_weights,
    op_calls,
    operator_calls,
    signs,
    small_arguments,
    weight,
)  # fmt: skip

from hadamoe import ContractError, Rotation, ops  # noqa: E402
from hadamoe.torch_ops import operators  # noqa: E402
from hadamoe.verify import layers  # noqa: E402


def same(torch_result, numpy_result):
    assert isinstance(torch_result, torch.Tensor)
    np.testing.assert_array_equal(torch_result.numpy(), numpy_result)


def test_torch_and_numpy_give_the_same_bits(rng):
    x = rng.normal(size=(2, 3, K)).astype(np.float32)
    t, w = torch.from_numpy(x), weight(rng, N, K, E, Rotation(None, signs(rng, K)))
    rotate = {"block": 16, "pre": signs(rng, 16), "post": signs(rng, K)}
    same(ops.hadamard(t, **rotate), ops.hadamard(x, **rotate))
    rows = np.array([[0, 5], [N * E - 1, 30]])
    same(ops.dequantize(w, torch.from_numpy(rows)), ops.dequantize(w, rows))
    same(ops.qmatmul(t, weight_one := weight(rng, N, K)), ops.qmatmul(x, weight_one))
    expert = rng.integers(0, E, (2, 3, 2))
    same(ops.qmatmul(t, w, expert=torch.from_numpy(expert)), ops.qmatmul(x, w, expert=expert))
    moe = moe_weights(rng)
    same(ops.moe_decode(t, moe, top_k=2), ops.moe_decode(x, moe, top_k=2))
    arrays = delta_arrays(rng)
    tensors = [torch.from_numpy(a.copy()) for a in arrays]
    shape = {"heads": HEADS, "head_dims": HEAD_DIMS}
    same(ops.gated_delta(*tensors, **shape), ops.gated_delta(*arrays, **shape))
    same(tensors[5], arrays[5])
    same(tensors[6], arrays[6])


@pytest.mark.parametrize("op", layers.BLOCKS)
def test_blocks_give_the_same_bits(op):
    call = layers.BLOCKS[op](np.random.default_rng(3), "rows")
    for a, b in zip(call(True, torch.tensor), call(True), strict=True):
        same(a, b)


def test_attention_gives_the_same_bits(rng):
    arrays = layers.attention_arrays(rng, 2, 3, 4, 2, 16, 8, 2, 6)
    tensors = [torch.tensor(a) for a in arrays.values()]
    mask = layers.padding(rng, 2, 3, 2, 6)
    y = ops.attention(*tensors, heads=4, past=2, mask=torch.tensor(mask))
    same(y, ops.attention(*arrays.values(), heads=4, past=2, mask=mask))
    same(tensors[5], arrays["keys"])
    same(tensors[6], arrays["values"])


def test_the_largest_results_are_the_same(rng):
    x, w = rng.normal(size=(2, 3, K)).astype(np.float32), weight(rng, N, K, 1, Rotation(16))
    want = ops.qmatmul_top(x, w, 4, norm=np.ones(K, np.float32))
    got = ops.qmatmul_top(torch.from_numpy(x), w, 4, norm=np.ones(K, np.float32))
    for a, b in zip(got, want, strict=True):
        same(a, b)


def test_bf16_results_are_rounded_f32_results(rng):
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    w = weight(rng, N, K)
    assert torch.equal(ops.qmatmul(x, w), ops.qmatmul(x.float(), w).bfloat16())


CALLS = operator_calls(np.random.default_rng(0))


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    results = opcheck(getattr(operators, name.split()[0]).default, CALLS[name])
    assert set(results.values()) == {"SUCCESS"}


def test_compile_fullgraph_of_every_op(rng):
    fixed, state = small_arguments(rng)
    compiled = torch.compile(Small(), fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 5):
        ids = torch.arange(2 * tokens).view(2, tokens)
        states = [[s.clone() for s in state] for _ in range(2)]
        want, got = Small()(ids, *fixed, states[0]), compiled(ids, *fixed, states[1])
        assert torch.equal(want, got)
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


OP_CALLS = {name: call for make in (op_calls, half_calls) for name, call in make(
    np.random.default_rng(1)).items()}  # fmt: skip


@pytest.mark.parametrize("name", OP_CALLS)
def test_compile_fullgraph_of_ops_over_packed_weights(name):
    op, tensors = OP_CALLS[name]
    eager, traced = ([t.clone() for t in tensors] for _ in range(2))
    want, got = op(*eager), torch.compile(op, fullgraph=True, backend="aot_eager")(*traced)
    torch.testing.assert_close([got, traced], [want, eager], rtol=0, atol=0, equal_nan=True)


def test_bad_input_raises_the_contract_error_of_the_native_op(rng):
    w = weight(rng, N, K)
    with pytest.raises(ContractError, match="qmatmul: "):
        ops.qmatmul(torch.zeros(2, K + 32), w)
    with pytest.raises(ContractError, match="qmatmul: "):
        ops.qmatmul(torch.zeros(2, K, dtype=torch.float64), w)
