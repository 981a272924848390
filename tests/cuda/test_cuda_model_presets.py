"""Every preset of the KV cache under a model on the simulated GPU."""

from __future__ import annotations

import functools

import pytest
import recorded
import torch
from pieces import in_pieces
from recorded import TOLERANCE
from simt import cuda, cuda_graph

import hadamoe
from hadamoe.kv import PRESETS

pytestmark = [
    pytest.mark.simulator,  # CPU tensors in place of the GPU's
    pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing())),
]


def load(**options):
    path = recorded.checkpoint("stdlib_configi")
    return hadamoe.load(path, dtype="float32", **options)[0]


@functools.cache
def wanted():
    return in_pieces(load(), torch.tensor([[100, 101, 102]]), 1)


@pytest.mark.parametrize("kv", PRESETS)
def test_tokens_of_the_raw_page(kv):
    """A preset's kernels run, in the graph too; its codes do not count yet."""
    with cuda_graph.installed():
        got = in_pieces(load(device="cuda", kv=kv), torch.tensor([[100, 101, 102]]), 1)
    torch.testing.assert_close(got, wanted(), rtol=0, atol=TOLERANCE)
