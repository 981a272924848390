"""Synthetic checkpoints: sizes of the full shape, files of a tiny one."""

from __future__ import annotations

import errno
import json
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open

from hadamoe import ContractError, formats, ops, synth

# GB of the published checkpoints, computed from their tables: (text and MTP, with vision)
FULL_GB = {
    "config-i": (15.655, None),
    "jangtq2": (10.738, 11.631),
    "mxfp4": (21.288, 22.181),
    "tq-apex2": (17.878, 18.543),
    "w4a16": (27.944, 28.837),
}
TENSORS = {"jangtq2": 1597, "config-i": 1597, "mxfp4": 1397}


@pytest.mark.parametrize("name", synth.FORMATS)
def test_full_size(name):
    text, vision = FULL_GB[name]
    assert synth.plan(name).nbytes / 1e9 == pytest.approx(text, abs=6e-4)
    if vision is not None:
        assert synth.plan(name, vision=True).nbytes / 1e9 == pytest.approx(vision, abs=6e-4)
    if name in TENSORS:
        assert len(synth.plan(name).tensors) == TENSORS[name]


def test_counts_the_specifications_give():
    jang = synth.plan("jangtq2", vision=True)
    assert len(jang.tensors) == 1930
    assert sum(t.name.endswith(".tq_packed") for t in jang.tensors) == 120
    assert len(jang.shards()) == 12
    quantization = json.loads(jang.files()["config.json"])["quantization"]
    assert sum(isinstance(v, dict) for v in quantization.values()) == 312
    apex = synth.plan("tq-apex2", vision=True)
    assert sum(t.name.endswith(".tq_packed") for t in (*apex.tensors, *apex.mtp)) == 435
    mxfp4 = json.loads(synth.plan("mxfp4").files()["config.json"])["quantization"]
    assert sum(isinstance(v, dict) for v in mxfp4.values()) == 412
    w4a16 = [t for t in synth.plan("w4a16").tensors if t.name.endswith(".weight_packed")]
    assert sum(".experts." in t.name for t in w4a16) == 37 * 256 * 3
    wide = [t for t in w4a16 if t.name.endswith("gate_proj.weight_packed") and t.shape[1] == 512]
    assert len(wide) == 5


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("synth")
    return {
        name: synth.plan(name, synth.TINY, vision=True, seed=3).write(root / name)
        for name in synth.FORMATS
    }


@pytest.mark.parametrize("name", synth.FORMATS)
def test_files_hold_what_was_planned(written, name):
    plan = synth.plan(name, synth.TINY, vision=True, seed=3)
    planned = {t.name: t for t in (*plan.tensors, *plan.mtp)}
    for file, tensors in plan.shards().items():
        with safe_open(written[name] / file, "np") as f:
            assert set(f.keys()) == {t.name for t in tensors}
            for t in tensors:
                assert tuple(f.get_slice(t.name).get_shape()) == t.shape
                planned.pop(t.name)
    assert not planned


@pytest.mark.parametrize("name", synth.FORMATS)
def test_reader_accepts_every_tensor(written, name):
    files = formats.read(written[name])
    assert files.weights["embed_tokens"].rows == synth.TINY.vocab
    count = {w.experts for n, w in files.weights.items() if n.endswith("experts.down")}
    assert count == {synth.TINY.experts}


def test_same_seed_same_bytes(tmp_path):
    plans = [synth.plan("config-i", synth.TINY, seed=s) for s in (1, 1, 2)]
    a, b, c = (
        (p.write(tmp_path / str(i)) / "model.safetensors").read_bytes() for i, p in enumerate(plans)
    )
    assert a == b
    assert a != c


@pytest.mark.parametrize("name", synth.FORMATS)
def test_scales_keep_the_rms(written, name):
    """Rows of every matrix have a norm near 1, so activations neither grow nor vanish."""
    for path, weight in formats.read(written[name]).weights.items():
        rows = np.arange(0, weight.rows, max(1, weight.rows // 16))
        norm = np.sqrt((ops.dequantize(weight, rows).astype(np.float64) ** 2).sum(1).mean())
        assert 0.7 < norm < 1.4, path


def test_refuses(tmp_path, monkeypatch):
    with pytest.raises(ContractError, match=r"^synth: format='gguf', needs one of config-i, "):
        synth.plan("gguf")
    (tmp_path / "there").mkdir()
    with pytest.raises(ContractError, match=r"there exists, will not overwrite it$"):
        synth.plan("mxfp4", synth.TINY).write(tmp_path / "there")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 10**9))
    with pytest.raises(OSError, match=r"10\.8 GB needed, 1\.0 GB free") as e:
        synth.plan("jangtq2").write(tmp_path / "big")
    assert e.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_interrupted_run_leaves_nothing(tmp_path):
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synth.plan("mxfp4", synth.TINY).write(tmp_path / "out", stop)
    assert list(tmp_path.iterdir()) == []


def test_shape_rules():
    with pytest.raises(ContractError, match="hidden=200, needs a multiple of 128"):
        replace(synth.TINY, hidden=200)
