"""No Metal source has what the Metal Shading Language refuses and clang does not (simt/lint.py)."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import recorded
from simt import metal
from simt.lint import word_rules

import hadamoe

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (pip install 'hadamoe[mlx]')")
pytestmark = pytest.mark.skipif(bool(metal.missing()), reason=str(metal.missing()))

FOLDER = Path(hadamoe.__file__).parent / "metal"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.metal")), ids=lambda p: p.name)
def test_words(path):
    lines = enumerate(path.read_text().splitlines(), 1)
    assert [str(issue) for issue in word_rules(lines, path.name)] == []


def test_kernels_of_a_model():
    """Pointers, conversions, buffers and recursion, one kernel of each kind."""
    model = hadamoe.load(
        recorded.checkpoint("stdlib_jangtq2"), framework="mlx", dtype="float32", kv="hk4v3"
    )[0]
    with metal.installed() as log:
        cache = model.make_cache()
        for ids in (mx.arange(138)[None] % 250, mx.array([[5]])):
            mx.eval(model(ids, cache=cache))
    kinds = {re.match(r"custom_kernel_hadamoe_([a-z_]+)", run.name)[1]: run for run in log}
    assert len(kinds) > 8
    with ThreadPoolExecutor(2) as pool:
        issues = pool.map(metal.lint, [run.source for run in kinds.values()])
        assert [str(issue) for each in issues for issue in each] == []
