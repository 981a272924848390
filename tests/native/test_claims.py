"""Every op's claims on CPUs this machine may not have, and under sanitizers."""

from __future__ import annotations

import pytest

from hadamoe import ops
from hadamoe.verify import cases, claims, kv_cases, layers

INSTANCES = ops.instances()


def prove(runner, group) -> None:
    """Each case on each instruction set; its arrays end, then begin, at an unmapped page."""
    try:
        for isa in runner.isas():
            runner.set_isa(isa)
            for i, case in enumerate(group):
                runner.set_guard(before=i % 3 == 2)
                claims.check(case, runner)
    finally:
        runner.set_guard(before=False)


def test_hadamard(runner):
    prove(runner, [c for t in cases.FLOATS for c in cases.hadamard_cases(dtype=t)])


def test_gated_delta(runner):
    prove(runner, cases.gated_delta_cases())


def test_attention(runner):
    prove(runner, [layers.exact_attention_case(), *layers.attention_cases()])


def test_qmatmul_top(runner):
    prove(runner, layers.qmatmul_top_cases())


@pytest.mark.parametrize("op", layers.BLOCKS)
def test_blocks(runner, op):
    prove(runner, layers.block_cases(op))


@pytest.mark.parametrize("op", ["kv_encode", "kv_decode", "kv_scores"])
def test_kv_codecs(runner, op):
    every = (c for codec in kv_cases.OURS for c in kv_cases.codec_cases(codec))
    prove(runner, [c for c in every if c.op == op])


def test_kv_attend(runner):
    prove(runner, kv_cases.attend_cases())


def test_kv_attention_block(runner):
    prove(runner, kv_cases.block_cases())


@pytest.mark.parametrize("inst", INSTANCES, ids=str)
def test_dequantize(runner, inst):
    prove(runner, cases.dequantize_cases(inst))


@pytest.mark.parametrize("inst", INSTANCES, ids=str)
def test_qmatmul(runner, inst):
    prove(runner, cases.qmatmul_cases(inst, "integer"))
    prove(runner, cases.qmatmul_cases(inst, "gaussian", dtype="float16"))


@pytest.mark.parametrize("inst", INSTANCES, ids=str)
def test_moe_decode(runner, inst):
    prove(runner, [*cases.moe_decode_cases(inst), cases.moe_decode_gaussian_case(inst)])
