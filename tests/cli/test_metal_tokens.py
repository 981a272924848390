"""bench/metal_tokens.py: the whole model traced as on Metal, in as few launches as README says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (pip install 'hadamoe[mlx]')")
ROOT = Path(__file__).resolve().parent.parent.parent


def test_launches_and_bytes_of_a_token(tmp_path):
    out = tmp_path / "table.txt"
    script = ROOT / "bench" / "metal_tokens.py"
    command = [sys.executable, script, "--formats", "config-i", "--out", out]
    subprocess.run(command, check=True, capture_output=True)
    rows = [line.split() for line in out.read_text().splitlines() if line.startswith("config-i")]
    ours, stock = ({"launches": int(r[2]), "weights": float(r[3])} for r in rows)
    assert [r[1] for r in rows] == ["ours", "stock"]
    assert ours["weights"] == stock["weights"] == 1.85
    assert ours["launches"] <= 306
    assert stock["launches"] > 1500
