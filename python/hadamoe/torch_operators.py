"""The ops as PyTorch operators ``torch.ops.hadamoe.*``, for torch.compile, and on the CPU.

A stored matrix travels as a part table (int64 ``[experts, parts, 12]``, csrc/core/abi.h) and the u8
buffers its offsets point into. Each operator allocates its result, hands the arrays to the native
entry of the same name and returns; checks are the native contract's, so a bad call raises the
`ContractError` numpy callers get. Inference only: no operator has a derivative.
"""

from __future__ import annotations

import torch

from . import _cpu

Tensor = torch.Tensor

#: The operators; `hadamoe.torch_gpu` adds to them.
library = torch.library.Library("hadamoe", "DEF")


def _op(schema: str):
    """Registers the decorated function as the CPU meaning of ``schema``."""

    def register(fn):
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(schema.partition("(")[0], fn, "CPU")
        return fn

    return register


def _fake(name: str):
    """Registers the decorated function as the shapes and dtypes ``hadamoe::name`` returns."""
    return torch.library.register_fake(f"hadamoe::{name}", lib=library)


def _padded(columns: int, block: int) -> int:
    return columns if block == 0 else (columns + block - 1) // block * block


@_op("hadamard(Tensor x, Tensor? pre, Tensor? post, int block, ScalarType dtype) -> Tensor")
def _hadamard(x, pre, post, block, dtype):
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], _padded(x.shape[-1], block)), dtype=dtype)
    k, k2 = x.shape[-1], y.shape[-1]
    _cpu.call("hadamard", [x.view(-1, k), pre, post], [y.view(-1, k2)], [block], [])
    return y


@_fake("hadamard")
def _(x, pre, post, block, dtype):
    return x.new_empty((*x.shape[:-1], _padded(x.shape[-1], block)), dtype=dtype)


@_op(
    "dequantize(Tensor parts, Tensor rows, Tensor[] buffers, int columns, ScalarType dtype)"
    " -> Tensor"
)
def _dequantize(parts, rows, buffers, columns, dtype):
    rows = rows.contiguous()
    y = rows.new_empty((*rows.shape, columns), dtype=dtype)
    _cpu.call("dequantize", [parts, rows.view(-1), *buffers], [y.view(-1, columns)], [columns], [])
    return y


@_fake("dequantize")
def _(parts, rows, buffers, columns, dtype):
    return rows.new_empty((*rows.shape, columns), dtype=dtype)


@_op(
    "qmatmul(Tensor x, Tensor parts, Tensor? expert, Tensor[] buffers, SymInt rows, "
    "ScalarType dtype) -> Tensor"
)
def _qmatmul(x, parts, expert, buffers, rows, dtype):
    x = x.contiguous()
    k = x.shape[-1]
    if expert is None:
        y = x.new_empty((*x.shape[:-1], rows), dtype=dtype)
        out = y.view(-1, rows)
    else:
        y = x.new_empty((*expert.shape, rows), dtype=dtype)
        out = y.view(-1, expert.shape[-1], rows)
        expert = expert.contiguous().view(-1, expert.shape[-1])
    _cpu.call("qmatmul", [x.view(-1, k), parts, expert, *buffers], [out], [], [])
    return y


@_fake("qmatmul")
def _(x, parts, expert, buffers, rows, dtype):
    lead = x.shape[:-1] if expert is None else expert.shape
    return x.new_empty((*lead, rows), dtype=dtype)


@_op(
    "moe_decode(Tensor x, Tensor? hidden_pre, Tensor? hidden_post, Tensor? inter_pre, "
    "Tensor? inter_post, Tensor router, Tensor gate_up, Tensor down, Tensor shared_gate_up, "
    "Tensor shared_down, Tensor shared_gate, Tensor[] buffers, int top_k, bool normalize, "
    "int hidden_block, int inter_block, int rotated) -> (Tensor y, Tensor expert, Tensor weight)"
)
def _moe_decode(x, *args):
    *arrays, buffers, top_k, normalize, hidden_block, inter_block, rotated = args
    x = x.contiguous()
    y = torch.empty_like(x)
    flat = x.view(-1, x.shape[-1])
    expert = x.new_empty((flat.shape[0], top_k), dtype=torch.int32)
    weight = x.new_empty((flat.shape[0], top_k), dtype=torch.float32)
    _cpu.call(
        "moe_decode",
        [flat, *arrays, *buffers],
        [y.view(flat.shape), expert, weight],
        [top_k, int(normalize), hidden_block, inter_block, rotated],
        [],
    )
    return y, expert, weight


@_fake("moe_decode")
def _(x, *args):
    top_k, tokens = args[-5], x.numel() // x.shape[-1]
    return (
        x.new_empty(x.shape),
        x.new_empty((tokens, top_k), dtype=torch.int32),
        x.new_empty((tokens, top_k), dtype=torch.float32),
    )


@_op(
    "gated_delta(Tensor proj, Tensor conv_weight, Tensor a_log, Tensor dt_bias, Tensor norm, "
    "Tensor(a!) conv_state, Tensor(b!) state, int key_heads, int value_heads, int key_dim, "
    "int value_dim, float eps, ScalarType dtype) -> Tensor"
)
def _gated_delta(
    proj, conv_weight, a_log, dt_bias, norm, conv_state, state, hk, hv, dk, dv, eps, dtype
):
    proj = proj.contiguous()
    y = proj.new_empty((proj.shape[0], proj.shape[1], hv * dv), dtype=dtype)
    _cpu.call(
        "gated_delta",
        [proj, conv_weight, a_log, dt_bias, norm],
        [y, conv_state, state],
        [hk, hv, dk, dv],
        [eps],
    )
    return y


@_fake("gated_delta")
def _(proj, conv_weight, a_log, dt_bias, norm, conv_state, state, hk, hv, dk, dv, eps, dtype):
    return proj.new_empty((proj.shape[0], proj.shape[1], hv * dv), dtype=dtype)


@_op(
    "attention(Tensor proj, Tensor q_norm, Tensor k_norm, Tensor cos, Tensor sin, Tensor? mask, "
    "Tensor(a!) keys, Tensor(b!) values, SymInt heads, SymInt past, float eps, ScalarType dtype)"
    " -> Tensor"
)
def _attention(proj, q_norm, k_norm, cos, sin, mask, keys, values, heads, past, eps, dtype):
    y = proj.new_empty((*proj.shape[:2], heads * q_norm.shape[-1]), dtype=dtype)
    arrays = [None if a is None else a.contiguous() for a in (proj, q_norm, k_norm, cos, sin, mask)]
    _cpu.call("attention", arrays, [y, keys, values], [heads, past], [eps])
    return y


@_fake("attention")
def _(proj, q_norm, k_norm, cos, sin, mask, keys, values, heads, past, eps, dtype):
    return proj.new_empty((*proj.shape[:2], heads * q_norm.shape[-1]), dtype=dtype)


@_op(
    "attention_block(Tensor x, Tensor cos, Tensor sin, Tensor? mask, Tensor norm, "
    "Tensor? hidden_pre, Tensor? hidden_post, Tensor? inner_pre, Tensor? inner_post, "
    "Tensor q_norm, Tensor k_norm, Tensor q, Tensor k, Tensor v, Tensor o, Tensor[] buffers, "
    "Tensor(a!) keys, Tensor(b!) values, SymInt past, int hidden_block, int inner_block, "
    "int rotated, float eps) -> Tensor"
)
def _attention_block(x, cos, sin, mask, *args):
    *arrays, buffers, keys, values, past, hidden_block, inner_block, rotated, eps = args
    x, cos, sin = (a.contiguous() for a in (x, cos, sin))
    y = torch.empty_like(x)
    inputs = [x, cos, sin, None if mask is None else mask.contiguous(), *arrays, *buffers]
    ints = [past, hidden_block, inner_block, rotated]
    _cpu.call("attention_block", inputs, [y, keys, values], ints, [eps])
    return y


@_op(
    "gated_delta_block(Tensor x, Tensor? mask, Tensor norm, Tensor? hidden_pre, "
    "Tensor? hidden_post, Tensor? inner_pre, Tensor? inner_post, Tensor conv_weight, Tensor a_log, "
    "Tensor dt_bias, Tensor gated_norm, Tensor qkv, Tensor z, Tensor b, Tensor a, Tensor out, "
    "Tensor[] buffers, Tensor(a!) conv_state, Tensor(b!) state, int key_heads, int value_heads, "
    "int key_dim, int value_dim, int hidden_block, int inner_block, int rotated, float eps)"
    " -> Tensor"
)
def _gated_delta_block(x, mask, *args):
    (*arrays, buffers, conv_state, state), ints, eps = args[:-8], args[-8:-1], args[-1]
    x = x.contiguous()
    y = torch.empty_like(x)
    inputs = [x, None if mask is None else mask.contiguous(), *arrays, *buffers]
    _cpu.call("gated_delta_block", inputs, [y, conv_state, state], list(ints), [eps])
    return y


@_op(
    "moe_block(Tensor x, Tensor norm, Tensor? hidden_pre, Tensor? hidden_post, Tensor? inter_pre, "
    "Tensor? inter_post, Tensor router, Tensor gate_up, Tensor down, Tensor shared_gate_up, "
    "Tensor shared_down, Tensor shared_gate, Tensor[] buffers, int top_k, bool normalize, "
    "int hidden_block, int inter_block, int rotated, float eps) -> Tensor"
)
def _moe_block(x, *args):
    (*arrays, buffers), ints, eps = args[:-6], args[-6:-1], args[-1]
    x = x.contiguous()
    y = torch.empty_like(x)
    flat, out = x.view(-1, x.shape[-1]), y.view(-1, x.shape[-1])
    _cpu.call("moe_block", [flat, *arrays, *buffers], [out], list(map(int, ints)), [eps])
    return y


@_op(
    "qmatmul_top(Tensor x, Tensor? norm, Tensor? pre, Tensor? post, Tensor parts, "
    "Tensor[] buffers, SymInt top, int block, float eps) -> (Tensor value, Tensor index)"
)
def _qmatmul_top(x, norm, pre, post, parts, buffers, top, block, eps):
    flat = x.contiguous().view(-1, x.shape[-1])
    value = x.new_empty((*x.shape[:-1], top), dtype=torch.float32)
    index = torch.empty_like(value, dtype=torch.int32)
    outputs = [value.view(-1, top), index.view(-1, top)]
    _cpu.call("qmatmul_top", [flat, norm, pre, post, parts, *buffers], outputs, [block], [eps])
    return value, index


@_fake("qmatmul_top")
def _(x, norm, pre, post, parts, buffers, top, block, eps):
    value = x.new_empty((*x.shape[:-1], top), dtype=torch.float32)
    return value, torch.empty_like(value, dtype=torch.int32)


for _name in ("attention_block", "gated_delta_block", "moe_block"):
    _fake(_name)(lambda x, *args: x.new_empty(x.shape))

operators = torch.ops.hadamoe
