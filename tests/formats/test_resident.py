"""Resident weights: the same bytes, out of the files, and nothing read that no weight uses."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from recorded import TINY, checkpoint

import hadamoe
from hadamoe import DeviceError, FormatError, formats, resident, synth
from hadamoe.resident import make_resident
from hadamoe.weight import root_of

FIELDS = ("codes", "scale", "bias", "codebook")


def arrays(files):
    """Every array of every weight, in order; None where a part has none."""
    return [
        getattr(part, field)
        for weight in files.weights.values()
        for expert in weight.parts
        for part in expert
        for field in FIELDS
    ] + [s.array for s in files.vision.values()]


def mapped(files, array):
    return any(root_of(array) is s.data for s in files.checkpoint.shards)


@pytest.mark.parametrize("name", TINY)
def test_same_arrays_outside_the_files(name):
    before, files = arrays(formats.read(checkpoint(name))), formats.read(checkpoint(name))
    calls = []
    copied = make_resident(files, progress=lambda done, total: calls.append((done, total)))
    for a, b in zip(before, arrays(files), strict=True):
        if a is None:
            assert b is None
            continue
        assert (a.dtype, a.shape, a.strides) == (b.dtype, b.shape, b.strides)
        assert a.tobytes() == b.tobytes()
        assert not mapped(files, b)
    assert calls[-1] == (copied, copied)
    assert [c[0] for c in calls] == sorted({c[0] for c in calls})
    assert copied <= files.checkpoint.nbytes


def test_tied_weights_stay_one_object():
    files = formats.read(checkpoint("stdlib_bf16"))
    tied = files.weights["lm_head"] is files.weights["embed_tokens"]
    make_resident(files)
    assert (files.weights["lm_head"] is files.weights["embed_tokens"]) == tied


def test_what_no_weight_uses_is_not_read(tmp_path):
    path = synth.plan("w4a16", synth.TINY, mtp=True, vision=True).write(tmp_path / "m")
    files = formats.read(path)
    assert files.mtp
    assert files.vision
    unused = [n for n in files.checkpoint.names() if "mtp" in n or "visual" in n]
    size = sum(files.checkpoint.tensor(n).array.nbytes for n in unused)
    assert 0 < make_resident(files, vision=False) <= files.checkpoint.nbytes - size
    for stored in files.vision.values():
        assert mapped(files, stored.array)


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are Linux's")
def test_memory_is_aligned_for_huge_pages():
    array = resident._allocate(12345)
    assert array.nbytes == 12345
    assert array.__array_interface__["data"][0] % (2 << 20) == 0
    assert not array.any()


def test_too_little_memory_is_refused_with_numbers(monkeypatch):
    files = formats.read(checkpoint("jangtq_tiny"))
    before = files.weights["lm_head"]
    monkeypatch.setattr(resident, "available_bytes", lambda: 1000)
    monkeypatch.setattr(resident, "_allocate", None)
    with pytest.raises(DeviceError) as e:
        make_resident(files)
    assert str(e.value).startswith("load: resident weights need 0.0")
    assert str(e.value).endswith(" bytes), 0.00 GB (1000 bytes) are available")
    assert files.weights["lm_head"] is before


def test_available_bytes_is_plausible():
    have = resident.available_bytes()
    assert have is None or 1 << 20 < have < 1 << 50


def test_a_file_cut_short_is_an_error(tmp_path):
    path = synth.plan("config-i", synth.TINY).write(tmp_path / "m")
    files = formats.read(path)
    shard = files.checkpoint.shards[0]
    half = shard.data.nbytes // 2
    with open(shard.path, "r+b") as f:
        f.truncate(half)
    with pytest.raises(FormatError) as e:
        make_resident(files)
    assert str(e.value) == f"{shard.path}: expected {shard.data.nbytes} bytes, found {half} bytes"


@pytest.mark.parametrize("name", ["stdlib_mxfp4", "w4a16_tiny"])
def test_a_loaded_model_gives_the_same_bits(name):
    torch = pytest.importorskip("torch")
    ids = torch.arange(3, 20)[None]
    logits = [
        hadamoe.load(checkpoint(name), resident=r)[0](input_ids=ids).logits for r in (False, True)
    ]
    assert np.array_equal(*(x.float().numpy() for x in logits))
