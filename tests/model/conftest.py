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
    return lambda name, dtype="float32": _load(checkpoint(name), dtype)
