"""Whole checkpoints on the simulated GPU: logits of prompts, of tokens by the graph, and what a
token launches."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import recorded
import torch
from pieces import in_pieces
from recorded import LOGITS, TOLERANCE
from simt import cuda, cuda_graph

import hadamoe
from hadamoe import ops, torch_cuda_model
from hadamoe.errors import DeviceError, UnsupportedError
from hadamoe.torch_decode import text_model

pytestmark = [
    pytest.mark.simulator,  # CPU tensors in place of the GPU's
    pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing())),
]


@pytest.fixture
def no_native_op(monkeypatch):
    """Whatever would run on the CPU by our native code raises."""
    monkeypatch.setattr(ops._cpu, "call", lambda op, *_: pytest.fail(f"{op} ran on the CPU"))


def load(name, **options):
    options = {"dtype": "float32", "device": "cuda"} | options
    return hadamoe.load(recorded.checkpoint(name), **options)[0]


@pytest.mark.usefixtures("no_native_op")
@pytest.mark.parametrize("name", sorted(LOGITS))
def test_logits(name):
    """A prompt in two pieces, a token by itself, then a recorded graph's."""
    ids, want, _ = recorded.logits(name)
    with cuda_graph.installed() as (machine, _):
        got = in_pieces(load(name), torch.from_numpy(ids[:1, :8]), [4, 1, 1, 1, 1])
    assert np.abs(got.numpy() - want[:1, :8]).max() < TOLERANCE
    assert len(machine.graphs) == 1


@pytest.mark.parametrize("name", ["stdlib_configi", "stdlib_tq_apex2"])
def test_launches_of_a_token(name):
    """The token's row, four for a Gated DeltaNet, five for attention, three for the experts, the
    head and what finds the largest; rotations are inside."""
    with cuda_graph.installed() as (machine, _):
        model = load(name)
        in_pieces(model, torch.tensor([[65, 66, 67, 68]]), [2, 1, 1])
    layers = text_model(model).layers
    linear = sum(layer.linear for layer in layers)
    found = Counter(name.split("<")[0] for name in machine.graphs[0])
    assert found == {
        "dequantize": 1,
        "qmatvec": 3 * len(layers) + 1,
        "delta_prepare": linear,
        "delta_step": linear,
        "attention": len(layers) - linear,
        "kv_runs": len(layers) - linear,
        "kv_join": len(layers) - linear,
        "moe_gate_up": len(layers),
        "moe_down": len(layers),
        "largest": 1,
        "add_": 1,
    }


def test_the_weights_must_fit():
    message = r"load: the weights need 0.00 GB .* \(262144 bytes"
    with cuda_graph.installed(free=1 << 18), pytest.raises(DeviceError, match=message):
        load("stdlib_configi")


def test_the_sequences_must_fit():
    with cuda_graph.installed() as (machine, _):
        model = load("stdlib_configi")
        machine.free = 1 << 16
        with pytest.raises(DeviceError, match=r"2 sequences of 1,536 tokens need 0.00 GB of"):
            model(torch.zeros(2, 3, dtype=torch.int64), use_cache=True)


def test_progress_counts_every_byte():
    seen = []
    with cuda_graph.installed():
        load("stdlib_configi", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 1 << 19
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m(x.repeat(65, 1), use_cache=True), "a batch of 65 sequences, on CUDA 1 to"),
        (lambda m, x: m(x, output_hidden_states=True), "output_hidden_states is not there"),
        (lambda m, x: m(x, attention_mask=torch.ones(1, 1, 2, 2)), r"mask of \[batch, tokens\]"),
        (
            lambda m, x: m.generate(x, max_new_tokens=3, cache_implementation="static"),
            "a StaticCache cannot hold our states",
        ),
    ],
    ids=["batch", "hidden", "mask", "cache"],
)
def test_refused(call, message):
    with cuda_graph.installed(), pytest.raises(UnsupportedError, match=message):
        call(load("stdlib_configi"), torch.tensor([[1, 2]]))


def test_generate_asks_for_the_last_logits_only(monkeypatch):
    """A prompt's other logits would take gigabytes."""
    with cuda_graph.installed():
        model, seen = load("stdlib_configi"), []
        real = model.lm_head.forward
        monkeypatch.setattr(model.lm_head, "forward", lambda x: seen.append(x.shape) or real(x))
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=1, pad_token_id=258)
    assert seen == [(1, 1, 128)]


def test_heads_without_kernels_are_refused(monkeypatch):
    monkeypatch.setattr(torch_cuda_model, "HEAD_DIMS", (64, 128))
    with cuda_graph.installed(), pytest.raises(UnsupportedError, match="head_dim is 32, on CUDA 6"):
        load("jangtq_tiny")


def test_a_rope_by_length_is_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0}
    with cuda_graph.installed(), pytest.raises(UnsupportedError, match="rope_type 'dynamic'"):
        load("stdlib_configi", rope=rope)
