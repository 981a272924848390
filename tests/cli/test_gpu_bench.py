"""bench/gpu.py before it meets a GPU: everything but clocks and profiles runs, in the simulator."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from simt import cuda, cuda_graph

from hadamoe import bench, ops, synth

pytestmark = [
    pytest.mark.simulator,  # CPU tensors in place of the GPU's
    pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing())),
]
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def gpu(monkeypatch):
    """The script, with kernels small enough for the simulator and no events of a GPU."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.setattr(bench, "SHAPES", {"dense": (48, 256), "experts": (32, 256)})
    names = ("gpu_kernels", "gpu_models", "gpu")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "hadamoe._cuda", type(sys)("_cuda"))
    kernels, models, script = map(importlib.import_module, names)

    def seconds(call, repeats=1):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    monkeypatch.setattr(kernels, "seconds", seconds)
    monkeypatch.setattr(kernels, "DEVICE", torch.device("cpu"))
    monkeypatch.setitem(kernels.SHAPES, "head", (64, 256))
    monkeypatch.setattr(kernels, "PROMPT_TOKENS", (16,))
    monkeypatch.setattr(models, "kernel_times", lambda model, prompt, n: {"k": (2.0 * n, n)})
    monkeypatch.setattr(models, "DEVICE", "cuda")
    monkeypatch.setattr(script, "claims", lambda clock: {"summary": "simulated"})
    monkeypatch.setattr(script, "sanitize", lambda clock: {"left_out": "simulated"})
    monkeypatch.setattr(script, "machine", lambda: {"gpu": "simulator"})
    for large in ("hadamards", "deltas"):  # their sizes are the model's
        monkeypatch.setattr(script, large, lambda copy: iter(()))
    return script


def test_the_report(gpu, monkeypatch, tmp_path):
    few = [ops.instances()[0], ops.instances()[-1]]
    monkeypatch.setattr(ops, "instances", lambda: few)
    monkeypatch.setattr(synth, "FORMATS", {"jangtq2": synth.FORMATS["jangtq2"]})
    out = tmp_path / "report.json"
    arguments = ["--out", out, "--folder", tmp_path, "--shape", "tiny", "--minutes", 60]
    arguments += ["--pool", 1, "--prompt", 4, "--context", 5, "--tokens", 2, "--batches", 2]
    with cuda_graph.installed():
        gpu.main([str(a) for a in arguments])
    report = json.loads(out.read_text())
    for name in ("models", "products", "prompts"):
        assert report[name]
        assert not [row for row in report[name] if "broke" in row], report[name]
    (model,) = report["models"]
    assert model["decode"] > 0
    assert model["batch_2"] > 0
    assert set(model["long"]) == {"bf16", "hk4v3"}
    assert model["kernels"]["busy_us"] == 2.0
    table = out.with_suffix(".txt").read_text()
    assert all(str(instance) in table for instance in few)
