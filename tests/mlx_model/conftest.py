"""Checkpoints opened once per session as mlx-lm's models."""

from __future__ import annotations

import functools

import pytest


@functools.cache
def _load(directory, options):
    import hadamoe

    return hadamoe.load(directory, framework="mlx", **dict(options))


@pytest.fixture(scope="session")
def load(checkpoint):
    """load(name, dtype="float32", **options) -> (model, tokenizer) of a checkpoint in the tests."""
    pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (pip install 'hadamoe[mlx]')")

    def opened(name, dtype="float32", **options):
        return _load(checkpoint(name), (("dtype", dtype), *options.items()))

    return opened
