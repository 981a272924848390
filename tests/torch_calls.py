"""One call of every operator of torch, and of every op that takes torch's tensors."""

from __future__ import annotations

import numpy as np
import torch

from hadamoe import Instance, Part, Rotation, Weight, ops
from hadamoe.torch_ops import as_tensor, operators
from hadamoe.verify import layers

K, N, E, I = 64, 48, 4, 32  # hidden, rows, experts, inner  # noqa: E741
HEADS, HEAD_DIMS, KERNEL = (2, 4), (8, 16), 4
C = 2 * HEADS[0] * HEAD_DIMS[0] + HEADS[1] * HEAD_DIMS[1]
WIDTH = C + HEADS[1] * HEAD_DIMS[1] + 2 * HEADS[1]


def weight(rng, rows, columns, experts=1, rotation=None):
    """4-bit affine rows (group 32), then as many f32 rows: two parts per expert."""

    def parts():
        n = rows // 2
        codes = rng.integers(0, 256, (n, columns // 2), dtype=np.uint8)
        scale, bias = rng.normal(0, 0.05, (2, n, columns // 32)).astype(np.float16)
        affine = Part(Instance("linear", 4, "f16"), n, 32, codes, scale, bias)
        plain = rng.normal(0, 0.3, (rows - n, columns)).astype(np.float32).view(np.uint8)
        return affine, Part(Instance("plain", 32, "f32"), rows - n, columns, plain)

    return Weight(columns, tuple(parts() for _ in range(experts)), rotation)


def one_row(rng, columns):
    row = rng.normal(0, 0.3, (1, columns)).astype(np.float32).view(np.uint8)
    return Weight(columns, ((Part(Instance("plain", 32, "f32"), 1, columns, row),),))


def signs(rng, n):
    return rng.choice([-1.0, 1.0], n).astype(np.float32)


def moe_weights(rng):
    hidden = Rotation(None, signs(rng, K))
    inner = Rotation(32, signs(rng, 32), signs(rng, 32))
    return ops.MoeWeights.of(
        router=weight(rng, E, K),
        gate_up=weight(rng, 2 * I, K, E, hidden),
        down=weight(rng, K, I, E, inner),
        shared_gate_up=weight(rng, 2 * I, K, 1, hidden),
        shared_down=weight(rng, K, I),
        shared_gate=one_row(rng, K),
    )


def attention_weights(rng, hidden):
    return ops.AttentionWeights.of(
        q=weight(rng, 128, K, 1, hidden), k=weight(rng, 32, K, 1, hidden),
        v=weight(rng, 32, K), o=weight(rng, K, K),
    )  # fmt: skip


def delta_weights(rng):
    inner = HEADS[1] * HEAD_DIMS[1]
    sizes = {"qkv": C, "z": inner, "b": HEADS[1], "a": HEADS[1]}
    return ops.DeltaWeights.of(
        **{n: weight(rng, rows, K) for n, rows in sizes.items()}, out=weight(rng, K, inner)
    )


def delta_arrays(rng, batch=2, tokens=3):
    def f32(*shape):
        return rng.normal(0, 0.5, shape).astype(np.float32)

    return (
        f32(batch, tokens, WIDTH), f32(C, KERNEL), f32(HEADS[1]), f32(HEADS[1]), f32(HEAD_DIMS[1]),
        f32(batch, C, KERNEL), f32(batch, HEADS[1], *HEAD_DIMS),
    )  # fmt: skip


def operator_calls(rng):
    """name -> arguments of one call of every operator."""
    x = torch.from_numpy(rng.normal(size=(2, 3, K)).astype(np.float32))
    one, many = ops.pack(weight(rng, N, K), weight(rng, N, K, E))
    buffers = [as_tensor(b) for b in one.buffers]
    expert = torch.from_numpy(rng.integers(0, E, (2, 3, 2)))
    moe = moe_weights(rng)
    moe_signs, tables, ints = moe.arguments(2, True)
    moe_arrays = [None if a is None else as_tensor(a) for a in (*moe_signs, *tables)]
    delta = [torch.from_numpy(a) for a in delta_arrays(rng)]
    seen = layers.attention_arrays(rng, 2, 3, 4, 2, 16, 8, 2, 6)
    seen = [torch.from_numpy(a) for a in seen.values()]
    mask = torch.from_numpy(layers.padding(rng, 2, 3, 2, 6))
    f32, bf16 = torch.float32, torch.bfloat16
    table = as_tensor(many.parts)
    return {
        "hadamard": (x, None, as_tensor(signs(rng, 16)), 16, f32),
        "hadamard padded": (x[..., :50].bfloat16(), None, None, 16, bf16),
        "dequantize": (table, torch.tensor([[0, 7], [N, 3]]), buffers, K, bf16),
        "qmatmul": (x, as_tensor(one.parts), None, buffers, N, f32),
        "qmatmul strided": (x[:, ::2], as_tensor(one.parts), None, buffers, N, bf16),
        "qmatmul expert": (x, table, expert, buffers, N, f32),
        "moe_decode": (x, *moe_arrays, [as_tensor(b) for b in moe.router.buffers], *ints),
        "gated_delta": (*delta, *HEADS, *HEAD_DIMS, 1e-6, f32),
        "attention": (*seen[:5], mask, *seen[5:], 4, 2, 1e-6, f32),
        **block_calls(rng, x, delta, seen, moe),
    }  # fmt: skip


def block_calls(rng, x, delta, seen, moe):
    """The same for the halves of a layer."""
    hidden, norm = Rotation(None, signs(rng, K)), torch.ones(K)
    attention, linear = attention_weights(rng, hidden), delta_weights(rng)

    def fixed(weights, *first):
        roles_signs, tables, ints = weights.arguments(*first)
        buffers = [as_tensor(b) for b in weights.buffers]
        return [None if s is None else as_tensor(s) for s in roles_signs], [
            as_tensor(t) for t in tables
        ], buffers, ints  # fmt: skip

    calls = {}
    turns, tables, buffers, ints = fixed(attention, 2)
    norms = seen[1:3]
    arrays = (*seen[3:5], None, norm, *turns, *norms, *tables, buffers, *seen[5:])
    calls["attention_block"] = (x, *arrays, *ints, 1e-6)
    turns, tables, buffers, ints = fixed(linear, *HEADS, *HEAD_DIMS)
    mask = torch.tensor([[True] * 3, [False, True, True]])
    arrays = (norm, *turns, *delta[1:5], *tables, buffers, *delta[5:])
    calls["gated_delta_block"] = (x, mask, *arrays, *ints, 1e-6)
    turns, tables, buffers, ints = fixed(moe, 2, True)
    head = ops.pack(weight(rng, 48, K, 1, hidden))
    pre, shared = as_tensor(head.rotation.pre), [as_tensor(b) for b in head.buffers]
    arrays = (norm, pre, None, as_tensor(head.parts), shared)
    calls["qmatmul_top"] = (x, *arrays, 5, 0, 1e-6)
    calls["moe_block"] = (x, norm, *turns, *tables, buffers, *ints, 1e-6)
    return calls


def op_calls(rng):
    """name -> (a function of tensors, the tensors) of one call of every op over packed weights;
    vectors are numpy's, as a checkpoint's are."""
    x = torch.from_numpy(rng.normal(size=(2, 3, K)).astype(np.float32))
    turn = Rotation(None, signs(rng, K))
    dense, many = ops.pack(weight(rng, N, K, 1, turn), weight(rng, N, K, E))
    expert = torch.from_numpy(rng.integers(0, E, (2, 3, 2)))
    moe, norm = moe_weights(rng), rng.normal(1, 0.1, K).astype(np.float32)
    pre = signs(rng, 16)
    proj, *vectors, conv, state = delta_arrays(rng)
    sizes = {"heads": HEADS, "head_dims": HEAD_DIMS}

    def delta(proj, conv, state):
        return ops.gated_delta(proj, *vectors, conv, state, **sizes)

    return {
        "hadamard": (lambda x: ops.hadamard(x, block=16, pre=pre), [x]),
        "dequantize": (lambda rows: ops.dequantize(dense, rows), [torch.tensor([0, 7])]),
        "qmatmul": (lambda x: ops.qmatmul(ops.hadamard(x), dense), [x]),
        "qmatmul expert": (lambda x, e: ops.qmatmul(x, many, expert=e), [x, expert]),
        "qmatmul_top": (lambda x: ops.qmatmul_top(x, dense, 5, norm=norm), [x]),
        "moe_decode": (lambda x: ops.moe_decode(x, moe, top_k=2), [x]),
        "gated_delta": (delta, [torch.from_numpy(a) for a in (proj, conv, state)]),
    }


def half_calls(rng):
    """`op_calls` of attention and of the halves of a layer."""
    x = torch.from_numpy(rng.normal(size=(2, 3, K)).astype(np.float32))
    norm, hidden = rng.normal(1, 0.1, K).astype(np.float32), Rotation(None, signs(rng, K))
    arrays = layers.attention_arrays(rng, 2, 3, 4, 2, 16, 8, 2, 6)
    q_norm, k_norm = arrays.pop("q_norm"), arrays.pop("k_norm")
    proj, *rest = map(torch.from_numpy, arrays.values())
    attention, linear, moe = attention_weights(rng, hidden), delta_weights(rng), moe_weights(rng)
    _, *vectors, conv, state = delta_arrays(rng)
    sizes = {"heads": HEADS, "head_dims": HEAD_DIMS}

    def alone(proj, *rest):
        return ops.attention(proj, q_norm, k_norm, *rest, heads=4, past=2)

    def attend(x, *rest):
        return ops.attention_block(x, norm, attention, q_norm, k_norm, *rest, past=2)

    def delta(x, *states):
        return ops.gated_delta_block(x, norm, linear, *vectors, *states, **sizes)

    return {
        "attention": (alone, [proj, *rest]),
        "attention_block": (attend, [x, *rest]),
        "gated_delta_block": (delta, [x, *map(torch.from_numpy, (conv, state))]),
        "moe_block": (lambda x: ops.moe_block(x, norm, moe, top_k=2), [x]),
    }


class Small(torch.nn.Module):
    """Every op once, in the order a model calls them."""

    def forward(self, ids, table, dense, square, experts, moe, delta, state):
        emb, buffers = table
        x = operators.dequantize(emb, ids, buffers, K, torch.float32)
        x = operators.hadamard(x, None, None, 0, torch.float32)
        proj = operators.qmatmul(x, dense[0], None, dense[1], WIDTH, torch.float32)
        y = operators.gated_delta(proj, *delta, *state, *HEADS, *HEAD_DIMS, 1e-6, torch.float32)
        x = x + operators.qmatmul(y, square[0], None, square[1], K, torch.float32)
        return operators.moe_decode(x, *moe, *experts)[0]


def small_arguments(rng):
    """(what `Small` reads but ids and states, its states)."""

    def stored(w):
        p = ops.pack(w)
        return as_tensor(p.parts), [as_tensor(b) for b in p.buffers]

    moe = moe_weights(rng)
    moe_signs, tables, ints = moe.arguments(2, True)
    moe_arrays = [None if a is None else as_tensor(a) for a in (*moe_signs, *tables)]
    moe_arrays.append([as_tensor(b) for b in moe.router.buffers])
    _, *delta = (torch.from_numpy(a) for a in delta_arrays(rng))
    fixed = (
        stored(weight(rng, N, K)), stored(weight(rng, WIDTH, K)),
        stored(weight(rng, K, HEADS[1] * HEAD_DIMS[1])), ints, moe_arrays, delta[:4],
    )  # fmt: skip
    return fixed, delta[4:]
