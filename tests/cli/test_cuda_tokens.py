"""bench/cuda_tokens.py: a decoded token on CUDA is as few launches as README says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parent.parent.parent


def test_launches_of_a_token(tmp_path):
    out = tmp_path / "table.txt"
    script = ROOT / "bench" / "cuda_tokens.py"
    command = [sys.executable, script, "--formats", "config-i", "--out", out]
    subprocess.run(command, check=True, capture_output=True)
    (row,) = (line.split() for line in out.read_text().splitlines() if line.startswith("config-i"))
    assert int(row[1]) <= 295
    assert float(row[2]) == 1.85
