"""The README's main job: text and bits per byte from all five formats beside their BF16 source."""

from __future__ import annotations

import subprocess
import sys

import pytest
from recorded import ROOT

pytest.importorskip("torch")


def test_five_formats():
    """Every format's bits per byte equals the figure recorded for an independent decoder."""
    script = ROOT / "examples" / "five_formats.py"
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for text in ("object, then the string is", "other, str):", "object, then is not None"):
        assert text in result.stdout
    rows = [line.split() for line in result.stdout.split("recorded\n")[1].splitlines()[:6]]
    assert len(rows) == 6
    for row in rows:
        score, recorded = float(row[-3]), float(row[-1])
        assert score == pytest.approx(recorded, abs=2e-4), " ".join(row)
