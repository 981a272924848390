"""Checkpoints opened once per session and dtype."""

from __future__ import annotations

import functools

import pytest


@functools.cache
def _load(directory, dtype):
    import hadamoe

    return hadamoe.load(directory, dtype=dtype)


@pytest.fixture(scope="session")
def load(checkpoint):
    """load(name, dtype="float32") -> (model, tokenizer) of a checkpoint in the tests."""
    pytest.importorskip("transformers")
    import torch

    torch.set_num_threads(1)  # for models this small its threads only wait in each other's way
    return lambda name, dtype="float32": _load(checkpoint(name), dtype)


@pytest.fixture(scope="module")
def quantized(checkpoint):
    """quantized(kv): the model of `kv_support` loaded with a preset."""
    import hadamoe

    return lambda kv: hadamoe.load(checkpoint("stdlib_configi"), dtype="bfloat16", kv=kv)[0]
