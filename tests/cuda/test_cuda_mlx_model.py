"""Whole checkpoints on MLX's CUDA device, simulated: logits, padding, and what MLX compiles."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import nvrtc
import pytest
import recorded
from recorded import TOLERANCE
from simt import cuda

import hadamoe

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (pip install 'hadamoe[mlx]')")
from hadamoe import mlx_host  # noqa: E402

pytestmark = [
    pytest.mark.simulator,  # --device is torch's GPU, not MLX's
    pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing())),
]


def load(name, **options):
    options = {"dtype": "float32"} | options
    return hadamoe.load(recorded.checkpoint(name), framework="mlx", **options)[0]


@cache
def forward(name: str) -> tuple[np.ndarray, list]:
    """Logits of 14 tokens, a prompt in two chunks, then single tokens; and the launches. Whatever
    would run on the CPU by our native code raises."""

    def refuse(op, *_):
        raise AssertionError(f"{op} ran on the CPU")

    model, ids, got, begin = load(name), mx.array(recorded.logits(name)[0][:1]), [], 0
    with pytest.MonkeyPatch.context() as patch, cuda.installed() as log:
        patch.setattr(mlx_host, "bridge", None)
        patch.setattr(mlx_host, "_eager", refuse)
        cache = model.make_cache()
        for size in (9, 3, 1, 1):
            got.append(np.array(model(ids[:, begin : begin + size], cache=cache)))
            begin += size
    return np.concatenate(got, 1), log


@pytest.mark.parametrize("name", ["stdlib_jangtq2", "stdlib_configi"])
def test_logits(name):
    """Every op a CUDA kernel."""
    got, log = forward(name)
    assert np.abs(got - recorded.logits(name)[1][:1, :14]).max() < TOLERANCE
    assert len(log) > 100


@pytest.mark.skipif(nvrtc.folder() is None, reason="nvidia-cuda-nvrtc is not installed")
def test_nvrtc_compiles_a_text_of_each_file():
    files = {}
    for launch in forward("stdlib_jangtq2")[1]:
        files[re.search(r"hadamoe/cuda/(\w+)\.cuh", launch.source)[1]] = launch
    assert {"qmatvec", "moe_gate_up", "moe_down", "gated_delta_step", "attention"} <= files.keys()
    for launch in files.values():
        assert ".maxntid" in nvrtc.compile_text(launch.source, launch.name)
        assert len(launch.source) < 2000  # MLX hashes it at each launch


def test_tokens_over_coded_pages():
    """The same model on the CPU, which decodes pages for each token."""
    model = load("stdlib_configi", kv="hk8v8")
    text = (recorded.checkpoint("stdlib_bf16") / "heldout.txt").read_bytes()
    ids = mx.array(np.frombuffer(text[:131], "u1").astype(np.int32)[None])

    def logits():
        cache = model.make_cache()
        parts = ids[:, :129], ids[:, 129:130], ids[:, 130:131]
        return [np.array(model(part, cache=cache)) for part in parts]

    want = logits()
    with cuda.installed() as log:
        got = logits()
    assert any("kv_runs" in launch.name for launch in log)
    for a, b in zip(got, want, strict=True):
        assert np.abs(a - b).max() < 3e-3  # queries are rounded to bytes
