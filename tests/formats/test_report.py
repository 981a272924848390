"""The numbers behind ``hadamoe inspect``."""

from __future__ import annotations

import json

import pytest
from recorded import STDLIB, TINY, checkpoint

from hadamoe import Instance, formats, inspect


def table(name):
    report = inspect.describe(checkpoint(name), verify=True)
    return report, {(r.role, str(r.instance), r.group): r for r in report.rows}


def test_roles_bytes_and_bits():
    report, rows = table("w4a16_tiny")
    experts = {k[1]: r for k, r in rows.items() if k[0] == "experts down"}
    assert {k: r.count for k, r in experts.items()} == {
        "linear_signed4/bf16": 15,
        "linear_signed8/bf16": 1,
        "plain/bf16": 24,
    }
    four = experts["linear_signed4/bf16"]
    assert (four.group, four.rotated, four.parameters) == (32, False, 15 * 256 * 128)
    assert four.nbytes == 15 * (256 * 64 + 256 * 4 * 2)
    assert four.token_bytes == four.nbytes * 2 / 8  # top 2 of 8
    embeddings = rows["embeddings", "plain/bf16", None]
    assert (embeddings.nbytes, embeddings.token_bytes) == (512 * 256 * 2, 256 * 2)
    assert (report.layers, report.experts, report.top_k, report.hidden) == (5, 8, 2, 256)
    assert report.vision == (
        21,
        sum(s.array.nbytes for s in formats.read(report.path).vision.values()),
    )
    assert (report.tensors, report.mtp, report.tokenizer) == (341, 19, False)
    assert report.bits_per_weight == pytest.approx(12.48, abs=0.01)


def test_rotated_rows_and_vision_linears():
    report, rows = table("tqvllm_tiny")
    assert {r.rotated for r in report.rows if r.instance.table == "codebook"} == {True}
    assert {r.rotated for r in report.rows if r.instance.table == "plain"} == {False}
    assert rows["vision linears", "codebook3/f32", 128].token_bytes == 0
    assert rows["router", "plain/f16", None].count == 4


@pytest.mark.parametrize("name", [*TINY, *STDLIB])
def test_every_checkpoint(name):
    report = inspect.describe(checkpoint(name))
    assert set(report.instances) <= formats.read(checkpoint(name)).instances()
    assert report.missing(report.instances) == []
    assert report.missing([]) == report.instances
    assert 0 < report.token_bytes < report.nbytes <= report.file_bytes
    data = json.loads(json.dumps(report.as_dict()))
    assert data["bits_per_weight"] == report.bits_per_weight
    assert data["rows"][0]["role"] == "embeddings"


def test_one_model_has_one_number_of_parameters():
    counts = {inspect.describe(checkpoint(name)).parameters for name in STDLIB}
    assert len(counts) == 1


def test_missing_instances_are_named():
    report = inspect.describe(checkpoint("jangtq_tiny"))
    have = [Instance("linear", 8, "f16"), Instance("plain", 16, "f16")]
    assert report.missing(have) == [Instance("codebook", 2, "f16")]
