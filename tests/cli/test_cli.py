"""The hadamoe command: what a person sees, and that an error is one line and an exit code."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from recorded import STDLIB, TINY, checkpoint
from typer.testing import CliRunner

from hadamoe.cli import app


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_help_names_every_command():
    result = call("--help")
    assert result.exit_code == 0
    for name in ("inspect", "run", "verify", "synth", "bench"):
        assert name in result.output


@pytest.mark.parametrize("name", [*STDLIB, *TINY])
def test_inspect(name):
    result = call("inspect", checkpoint(name))
    assert result.exit_code == 0, result.output
    for text in ("because", "experts gate, up", "bits per weight", "read per decoded token"):
        assert text in result.output
    assert "LACKING" not in result.output


def test_inspect_json_is_only_json():
    found = json.loads(call("inspect", checkpoint("stdlib_mxfp4"), "--json").stdout)
    assert found["format"] == "mxfp4"
    assert found["missing"] == []
    assert sum(r["nbytes"] for r in found["rows"]) <= found["file_bytes"]
    assert 3 < found["bits_per_weight"] < 8


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("inspect", "nowhere"), "hadamoe: nowhere is not a directory\n"),
        (("run", "nowhere", "-p", "x"), "hadamoe: nowhere is not a directory\n"),
        (("bench", "nowhere"), "hadamoe: nowhere is not a directory\n"),
        (("verify", "nowhere"), "hadamoe: nowhere is not a directory\n"),
        (
            ("bench", "--plot", "nowhere/b.png"),
            "hadamoe: bench: nowhere is not a directory, cannot write b.png\n",
        ),
        (
            ("synth", "gguf", "out"),
            "hadamoe: synth: format='gguf', needs one of "
            "config-i, tq-apex2, jangtq2, mxfp4, w4a16\n",
        ),
        (
            ("synth", "mxfp4", "out", "--shape", "huge"),
            "hadamoe: synth: shape='huge', needs one of full, tiny\n",
        ),
    ],
)
def test_an_error_is_one_line(args, message):
    result = call(*args)
    assert result.exit_code == 1
    assert result.stderr == message


def test_format_error_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    result = call("inspect", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith("hadamoe: ")
    assert result.stderr.count("\n") == 1


def test_names_in_files_do_not_drive_the_terminal(tmp_path):
    header = b'{"\\u001b[2Ja\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    whole = len(header).to_bytes(8, "little") + header + b"abc"
    (tmp_path / "model.safetensors").write_bytes(whole)
    result = call("inspect", tmp_path)
    assert "?[2Ja?: expected a span inside 3 bytes" in result.stderr


def test_wrong_usage_exits_with_2():
    assert call("synth", "mxfp4").exit_code == 2
    assert call("run", ".", "-p", "x", "--max-tokens", "0").exit_code == 2
    assert call("run", ".", "-p", "x", "--top-p", "2").exit_code == 2
    assert call("verify", "--threads", "100000").exit_code == 2


def test_synth_writes_and_refuses_to_overwrite(tmp_path):
    out = tmp_path / "tiny"
    first = call("synth", "w4a16", out, "--shape", "tiny", "--layers", 4, "--seed", 1)
    assert first.exit_code == 0, first.output
    assert "wrote" in first.output
    again = call("synth", "w4a16", out, "--shape", "tiny")
    assert again.exit_code == 1
    assert again.stderr == f"hadamoe: synth: {out} exists, will not overwrite it\n"


def test_synth_dry_run_writes_nothing(tmp_path):
    result = call("synth", "config-i", tmp_path / "x", "--dry-run")
    assert result.output == "config-i: 15.655 GB, 1,597 tensors in 3 files\n"
    assert not (tmp_path / "x").exists()


def test_missing_package_is_named():
    code = "import sys; sys.modules['typer'] = None\nfrom hadamoe.__main__ import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == (
        "hadamoe: the command line needs typer; install it with: pip install 'hadamoe[cli]'\n"
    )
