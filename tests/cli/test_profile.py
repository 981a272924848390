"""bench --profile and --resident: the parts of a token add up, and bytes are those of inspect."""

from __future__ import annotations

import json
import time

import pytest
from recorded import checkpoint
from typer.testing import CliRunner

import hadamoe
from hadamoe import _cpu, inspect, resident
from hadamoe.cli import app

pytest.importorskip("torch")
from hadamoe import torch_run
from hadamoe.profile import profile


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.mark.parametrize("name", ["stdlib_jangtq2", "stdlib_configi"])
def test_a_profile_adds_up(name):
    directory = checkpoint(name)
    model, _ = hadamoe.load(directory)
    untimed = _cpu.call
    p = profile(model, [[1, 2, 3, 4, 5]], 5)
    assert _cpu.call is untimed
    assert p.tokens == 4
    native = sum(line.seconds for line in p.lines)
    assert p.seconds == pytest.approx(native + p.python_seconds)
    assert p.python_seconds > 0
    assert all(0 <= line.product_seconds <= line.seconds for line in p.lines)
    assert {"delta net", "attention", "experts", "head"} <= {line.kind for line in p.lines}
    assert p.nbytes == pytest.approx(inspect.describe(directory).token_bytes, rel=0.01)
    assert all(line.calls >= 1 for line in p.lines)


def test_a_slow_start_is_no_part_of_a_token(monkeypatch):
    model, _ = hadamoe.load(checkpoint("stdlib_jangtq2"))
    generate = torch_run.generate

    def late(*args):
        time.sleep(0.05)
        return generate(*args)

    monkeypatch.setattr(torch_run, "generate", late)
    p = profile(model, [[1, 2, 3, 4, 5]], 5)
    assert [line.calls for line in p.lines if line.kind == "head"] == [1]


def test_products_are_counted_only_when_asked():
    model, _ = hadamoe.load(checkpoint("stdlib_mxfp4"))
    before = _cpu.products()
    model.generate(inputs=None, max_new_tokens=2, bos_token_id=1)
    assert _cpu.products() == before


def test_bench_profiles_resident_weights(tmp_path):
    result = call(
        "bench", checkpoint("stdlib_jangtq2"), "--no-instances", "--profile", "--resident",
        "--prompt-tokens", 8, "--new-tokens", 3, "--repeats", 1, "--json", tmp_path / "b.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for text in ("torch and Python", "in all", "outside products with weights:", "resident"):
        assert text in result.stdout
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["profile"]["tokens"] == 2
    assert report["model"]["weights"] == "resident"
    assert report["model"]["peak GB"] >= report["model"]["peak over weights GB"]


def test_profile_and_resident_need_a_checkpoint():
    for option in (("--profile",), ("--resident",), ("--rope", "yarn:4"), ("--context", "4k")):
        result = call("bench", *option)
        assert result.exit_code == 1
        assert result.stderr == (
            "hadamoe: bench: --profile, --resident, --rope and --context need a checkpoint "
            "directory\n"
        )


def test_run_resident_gives_the_same_text():
    args = ("run", checkpoint("stdlib_configi"), "-p", "def ", "--max-tokens", 8)
    mapped, copied = call(*args), call(*args, "--resident")
    assert copied.exit_code == 0
    assert mapped.stdout == copied.stdout


def test_too_little_memory_is_one_line(monkeypatch):
    monkeypatch.setattr(resident, "available_bytes", lambda: 1)
    result = call("run", checkpoint("stdlib_configi"), "-p", "def ", "--resident")
    assert result.exit_code == 1
    assert result.stderr.startswith("hadamoe: load: resident weights need 0.0")
    assert result.stderr.count("\n") == 1
