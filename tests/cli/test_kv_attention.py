"""bench/kv_attention.py at a tiny size: no contender does less than the others."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from recorded import ROOT

pytest.importorskip("torch")


def test_attention_of_every_cache_is_the_same_attention(tmp_path):
    """Contenders of bench/kv_attention.py: each within its codec's error of sdpa in f32."""
    done = subprocess.run(
        [
            sys.executable, ROOT / "bench" / "kv_attention.py", "--context", "320",
            "--tokens", "1,4", "--prefill", "320", "--chunk", "192",
            "--pool", "1", "--rounds", "1", "--seconds", "0",
            "--out", tmp_path / "a",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.txt").read_text() == done.stdout
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    most = {"bf16": 2e-3, "sdpa f32": 0, "hk8v8": 2e-2, "hk8v4": 0.12, "hk4v4": 0.16}
    found = {(r["tokens"], r["cache"]): r for r in rows}
    assert len(found) == 9 * 2 + 8
    for (_, name), r in found.items():
        assert r["error"] <= most.get(name, 1e-2 if name.startswith("sdpa") else 0.4), name
        assert 0 < r["ms"] <= r["median ms"]
