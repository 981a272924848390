"""bench/mac.py and `pytest --device` before they meet a Mac: everything runs, in the simulator."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from simt import metal

from hadamoe import bench, ops, synth

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (pip install 'hadamoe[mlx]')")
simulated = pytest.mark.skipif(metal.missing() is not None, reason=str(metal.missing()))
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def mac(monkeypatch):
    """The script, with kernels small enough for the simulator."""
    spec = importlib.util.spec_from_file_location("mac", ROOT / "bench" / "mac.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mac", module)
    monkeypatch.syspath_prepend(ROOT / "bench")
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BUDGET", 0.0)
    monkeypatch.setattr(bench, "SHAPES", {"dense": (64, 256), "experts": (32, 256)})
    return module


@pytest.fixture
def unimported(monkeypatch):
    """mlx-lm makes kernels of its model when that is imported; here, not before the simulator."""
    models = importlib.import_module("mlx_lm.models")
    for leaf in ("gated_delta", "qwen3_next", "qwen3_5", "qwen3_5_moe"):
        if hasattr(models, leaf):
            monkeypatch.setattr(models, leaf, getattr(models, leaf))  # restored with
            monkeypatch.delitem(sys.modules, f"mlx_lm.models.{leaf}")


@simulated
def test_the_report(mac, unimported, monkeypatch, tmp_path):
    few = [ops.instances()[0], ops.instances()[-1]]
    monkeypatch.setattr(ops, "instances", lambda: few)
    kept = {name: synth.FORMATS[name] for name in ("config-i", "jangtq2")}
    monkeypatch.setattr(synth, "FORMATS", kept)
    out = tmp_path / "report.json"
    arguments = ["--out", out, "--folder", tmp_path, "--shape", "tiny", "--no-tests"]
    arguments += ["--pool", 1, "--prompt", 5, "--context", 12, "--tokens", 3]
    with metal.installed():
        mac.main([str(a) for a in arguments])
    report = json.loads(out.read_text())
    assert report["copy_gbytes"] > 0
    assert report["machine"]["device"]["device_name"] == "simulator"
    rows = report["products"]
    assert [(r["instance"], r["what"]) for r in rows] == [
        (str(i), what) for i in few for what in ("dense", "experts")
    ]
    assert all(r["gbytes"] > 0 for r in rows)
    rows = report["models"]
    assert [(r["format"], r["who"], r["kv"], r["context"]) for r in rows] == [
        ("config-i", "hadamoe", "bf16", 5), ("config-i", "mlx-lm", "bf16", 5),
        ("jangtq2", "hadamoe", "bf16", 5),
        ("jangtq2", "hadamoe", "bf16", 12), ("jangtq2", "hadamoe", "hk4v3", 12),
    ]  # fmt: skip
    assert all(r["decode"] > 0 and r["prompt"] > 0 and r["gbytes"] > 0 for r in rows)
    assert list(tmp_path.iterdir()) == [out]  # checkpoints are gone


@simulated
def test_what_does_not_fit_is_left_out_and_what_breaks_is_told(mac, monkeypatch, tmp_path):
    sizes = mac.Sizes(shape="tiny", prompt=5, tokens=3)
    with metal.installed():
        mx.device_info = lambda: {"max_recommended_working_set_size": mac.SPARE}
        rows = mac.attempts(mac.models(tmp_path, 1.0, sizes), mac.show_model)
    assert [row["format"] for row in rows] == list(synth.FORMATS)
    assert all("left_out" in row for row in rows)
    monkeypatch.setattr(synth, "FORMATS", {"mxfp4": synth.FORMATS["mxfp4"]})
    monkeypatch.setattr(mac, "speed", lambda *_: 1 / 0)
    with metal.installed():
        rows = mac.attempts(mac.models(tmp_path, 1.0, sizes), mac.show_model)
    assert [row["broke"] for row in rows] == ["ZeroDivisionError: division by zero"] * 2


@pytest.mark.skipif(mx.metal.is_available(), reason="this machine has a Metal device")
def test_without_a_metal_device_it_says_so(mac, tmp_path):
    with pytest.raises(SystemExit, match="needs a Mac"):
        mac.main(["--out", str(tmp_path / "no.json"), "--folder", str(tmp_path)])
    command = [sys.executable, "-m", "pytest", "tests/metal", "--device", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 4
    assert "MLX computes on no Metal device here" in done.stderr


@simulated
def test_the_tests_of_kernels_run_on_a_device(tmp_path):
    """The simulator as the device: `--device` changes what installs it, and sees a wrong result."""
    (tmp_path / "as_device.py").write_text(
        "from simt import metal\nopen_ = metal.installed()\nopen_.__enter__()\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "as_device", "--device", "-q", "-rs"]
    command += ["tests/metal/test_metal_gated_delta.py", "-k", "once or another or tokens"]
    paths = [str(tmp_path), str(ROOT / "tests"), *sys.path]
    environment = {"PYTHONPATH": ":".join(filter(None, paths)), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
