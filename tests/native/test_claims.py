"""Every op's claims on CPUs this machine may not have, and under sanitizers."""

from __future__ import annotations

import pytest

from hadamoe import ops
from hadamoe.verify import cases, claims, layers

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
