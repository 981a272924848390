"""Whole checkpoints on the simulated Metal device: logits, padding, and what a token launches."""

from __future__ import annotations

from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
import recorded
from recorded import LOGITS, TOLERANCE
from simt import metal

import hadamoe
from hadamoe import mlx_host

pytestmark = pytest.mark.skipif(metal.missing() is not None, reason=str(metal.missing()))
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (pip install 'hadamoe[mlx]')")
from mlx_lm.models import cache as caches  # noqa: E402


@pytest.fixture
def no_native_op(monkeypatch):
    """Whatever would run on the CPU by our native code raises."""

    def refuse(op, *_):
        raise AssertionError(f"{op} ran on the CPU")

    monkeypatch.setattr(mlx_host, "bridge", None)
    monkeypatch.setattr(mlx_host, "_eager", refuse)


def load(name, **options):
    options = {"dtype": "float32"} | options
    return hadamoe.load(recorded.checkpoint(name), framework="mlx", **options)[0]


@pytest.mark.usefixtures("no_native_op")
@pytest.mark.parametrize("name", LOGITS)
def test_logits(name):
    """A prompt in two chunks, then single tokens, every op a Metal kernel and every finding of the
    simulator an error."""
    model, (ids, want, _) = load(name), recorded.logits(name)
    ids, got, begin = mx.array(ids[:1, :12]), [], 0
    with metal.installed():
        cache = model.make_cache()
        for size in (7, 3, 1, 1):
            got.append(np.array(model(ids[:, begin : begin + size], cache=cache)))
            begin += size
    assert np.abs(np.concatenate(got, 1) - want[:1, :12]).max() < TOLERANCE


def test_a_padded_batch():
    """Sequences behind which tokens are padding have the states and logits they have alone."""
    model = load("stdlib_jangtq2")
    rows = [mx.array([[65, 66, 67, 68, 69]]), mx.array([[70, 71]])]
    batch = mx.concatenate([rows[0], mx.pad(rows[1], [(0, 0), (0, 3)])])
    token = mx.array([[5], [6]])
    want = []
    for row, new in zip(rows, token, strict=True):
        alone = model.make_cache()
        model(row, cache=alone)
        want.append(np.array(model(new[None], cache=alone)))
    with metal.installed():
        cache = [type(c).merge([c, c]) for c in model.make_cache()]
        for c in cache:
            c.prepare(lengths=[5, 2], right_padding=[0, 3])
        for begin, end in ((0, 3), (3, 5)):
            mx.eval(model(batch[:, begin:end], cache=cache))
        for c in cache:
            c.finalize()
        got = np.array(model(token, cache=cache))
    assert np.abs(got - np.concatenate(want)).max() < TOLERANCE


def test_padding_in_front():
    """Positions of padding are negative, as mlx-lm counts them; nothing of it is seen."""
    model = load("stdlib_mxfp4")
    row = [70, 71, 72]
    want = np.array(model(mx.array([row]), cache=model.make_cache()))
    with metal.installed():
        cache = [
            caches.ArraysCache(2, [2]) if layer.is_linear else caches.BatchKVCache([2])
            for layer in model.layers
        ]
        got = np.array(model(mx.array([[0, 0, *row]]), cache=cache))
    assert np.abs(got[:, 2:] - want).max() < TOLERANCE


@pytest.mark.parametrize(
    ("options", "allowed"),
    [({"rope": "yarn:256"}, 3e-5), ({"dtype": "bfloat16"}, 0.05), ({"kv": "hk8v8"}, 3e-5)],
    ids=str,
)
def test_options(options, allowed):
    """Beside the same model on the CPU."""
    model, ids = load("w4a16_tiny", **options), mx.array([[5, 80, 255, 3, 17, 40, 2]])

    def logits():
        cache = model.make_cache()
        return [np.array(model(part, cache=cache)) for part in (ids[:, :5], ids[:, 5:6])]

    want = logits()
    with metal.installed():
        got = logits()
    for a, b in zip(got, want, strict=True):
        assert np.abs(a - b).max() < allowed


@pytest.mark.parametrize("name", ["stdlib_tq_apex2", "stdlib_configi"])
def test_launches_of_a_token(name):
    """The token's row, three for a Gated DeltaNet, round attention and for the experts, one for the
    head; rotations are inside."""
    model = load(name)
    with metal.installed() as log:
        cache = model.make_cache()
        mx.eval(model(mx.array([[65, 66]]), cache=cache))
        before = len(log)
        mx.eval(model(mx.array([[67]]), cache=cache))
    names = Counter(launch.name.split("hadamoe_")[1].split("_")[0] for launch in log[before:])
    linear = sum(layer.is_linear for layer in model.layers)
    attention = len(model.layers) - linear
    assert names == {
        "dequantize": 1,
        "qmatvec": 3 * len(model.layers) + 1,
        "gated": linear,
        "attention": attention,
        "moe": 2 * len(model.layers),
    }


@pytest.mark.parametrize(("kv", "count"), [("hk8v8", 138), ("hk4v3", 195)])
def test_tokens_over_coded_pages(kv, count):
    """What PyTorch's path computes on the same codes; only products and norms differ in order."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = load("stdlib_configi", kv=kv)
    peer, _ = hadamoe.load(recorded.checkpoint("stdlib_configi"), dtype="float32", kv=kv)
    text = np.frombuffer((recorded.checkpoint("stdlib_bf16") / "heldout.txt").read_bytes(), "u1")
    parts = np.split(text[:count].astype(np.int64)[None], range(128, count), 1)
    past, want, got = None, [], []
    with torch.no_grad():
        for ids in parts:
            out = peer(torch.from_numpy(ids), past_key_values=past, use_cache=True)
            past = out.past_key_values
            want.append(out.logits.numpy())
    with metal.installed() as log:
        cache = model.make_cache()
        got = [np.array(model(mx.array(ids), cache=cache)) for ids in parts]
    assert any("hadamoe_kv_runs" in launch.name for launch in log)
    errors = [np.abs(a - b).max() for a, b in zip(got, want, strict=True)]
    assert np.median(errors) < TOLERANCE / 3
    assert max(errors) < 3 * TOLERANCE  # a number at a code's edge may fall to either side
