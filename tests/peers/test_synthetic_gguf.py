"""bench/peers/synthetic_gguf.py: the GGUF llama.cpp is measured with is this model, and sane."""

from __future__ import annotations

import sys
from importlib import import_module

import numpy as np
import pytest
from recorded import ROOT

from hadamoe.synth import PRESETS

gguf = pytest.importorskip("gguf")
sys.path.insert(0, str(ROOT / "bench" / "peers"))
synthetic_gguf = import_module("synthetic_gguf")
sys.path.pop(0)


def test_the_dimensions_are_those_of_our_synthetic_checkpoints():
    ours, theirs = PRESETS["full"], synthetic_gguf
    assert (ours.layers, ours.interval) == (theirs.LAYERS, theirs.ATTENTION_EVERY)
    assert (ours.hidden, ours.moe, ours.vocab) == (theirs.HIDDEN, theirs.INNER, theirs.VOCABULARY)
    assert (ours.experts, ours.top_k) == (theirs.EXPERTS, theirs.USED)
    assert (ours.heads, ours.kv_heads, ours.head_dim) == (
        theirs.HEADS, theirs.KV_HEADS, theirs.HEAD_DIM,
    )  # fmt: skip
    assert (ours.key_heads, ours.value_heads) == (theirs.KEY_HEADS, theirs.VALUE_HEADS)
    assert (ours.key_dim, ours.value_dim, ours.conv) == (theirs.STATE, theirs.STATE, theirs.TAPS)


def test_bytes_of_a_token():
    """Q8_0 takes 34 bytes for 32 numbers: 2945 million of them are read, the router in f32."""
    plan = synthetic_gguf.tensors("q8_0", "q8_0")
    matrices = [t for t in plan if len(t.shape) > 1 and t.type != synthetic_gguf.Type.F32]
    router = 40 * 2048 * 256
    read = sum(t.token_bytes for t in matrices) * 32 // 34
    assert read + router == pytest.approx(2945e6, rel=0.002)


@pytest.mark.parametrize("experts", synthetic_gguf.TYPES)
def test_what_is_written_reads_back_with_the_spread_asked_for(experts, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic_gguf, "VOCABULARY", 512)
    monkeypatch.setattr(synthetic_gguf, "EXPERTS", 8)
    path = tmp_path / "m.gguf"
    size = synthetic_gguf.write(str(path), experts, "q4_0", 4)
    plan = {t.name: t for t in synthetic_gguf.tensors(experts, "q4_0", 4)}
    read = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert read.keys() == plan.keys()
    assert size["bytes"] == sum(int(t.n_bytes) for t in read.values())
    for name in ("blk.0.ffn_down_exps.weight", "blk.3.attn_q.weight", "token_embd.weight"):
        want, found = plan[name], read[name]
        assert tuple(found.shape)[::-1] == want.shape
        assert found.tensor_type == want.type
        values = gguf.quants.dequantize(found.data, found.tensor_type)
        assert np.isfinite(values).all()
        assert 0.5 < values.std() / want.fill < 2
        assert abs(values.mean()) < 0.2 * want.fill
