"""hadamoe verify: everything holds here, and what does not hold is said with its numbers."""

from __future__ import annotations

import dataclasses

import pytest

from hadamoe import Instance, formats, ops, verify
from hadamoe.verify import cases


@pytest.fixture(scope="module")
def rows(checkpoint):
    seen = []
    before = ops.isa()
    found = verify.run(checkpoint("stdlib_mxfp4"), seen.append)
    assert ops.isa() == before
    assert seen == found
    return found


def test_every_claim_holds_on_this_machine(rows):
    assert [r.detail for r in rows if not r.passed] == []
    for isa in ops.isas():
        proved = {(r.op, r.instance, r.claim) for r in rows if r.isa == isa}
        for op in set(ops._cpu.ops()) - {"read_bytes"}:
            assert any(p[0] == op for p in proved), f"nothing proved about {op} on {isa}"
        for inst in ops.instances():
            for claim in ("exact", "bound", "deterministic"):
                assert ("qmatmul", str(inst), claim) in proved


def test_every_kind_of_weight_in_the_files_was_multiplied(rows, checkpoint):
    model = formats.read(checkpoint("stdlib_mxfp4"))
    held = {str(i) for w in model.weights.values() for i in w.instances()}
    assert {r.instance for r in rows if r.claim == "file"} == held


def test_a_broken_kernel_is_reported(monkeypatch):
    good = next(cases.hadamard_cases())
    bad = dataclasses.replace(good, expected=(good.expected[0] + 1,))
    everything = [(("hadamard", None), [bad, good])]
    monkeypatch.setattr(cases, "by_op_and_instance", lambda: everything)
    row = verify.run()[0]
    assert (row.op, row.claim, row.passed, row.cases) == ("hadamard", "exact", False, 1)
    assert "output 0 is wrong in 3 of 3 places, first [0, 0]: " in row.detail


def test_an_instance_without_code_is_reported(monkeypatch, checkpoint):
    monkeypatch.setattr(ops, "supports", lambda i: i != Instance("e2m1", 4, "e8m0"))
    monkeypatch.setattr(cases, "by_op_and_instance", list)
    failed = [r for r in verify.run(checkpoint("stdlib_mxfp4")) if not r.passed]
    assert {r.instance for r in failed} == {"e2m1/e8m0"}
    assert failed[0].detail.endswith("needs e2m1/e8m0, for which this build has no code")
