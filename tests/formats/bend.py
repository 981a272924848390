"""Ways to put one thing wrong with a checkpoint."""

from __future__ import annotations

import copy
import functools

import numpy as np
from raw_checkpoint import Raw, stored
from recorded import checkpoint

MLX, JANG, TQ, CT, MX = (
    "configi_tiny", "jangtq_tiny", "tqvllm_tiny", "w4a16_tiny", "mxfp4_node_tiny",
)  # fmt: skip
ML = "language_model.model.layers"
HF = "model.language_model.layers"
F32 = np.float32


def put(name, array, dtype=None):
    """Add or replace a tensor."""
    return lambda ck: ck.tensors.__setitem__(name, stored(array, dtype))


def drop(name):
    return lambda ck: ck.tensors.pop(name)


def drop_all(fragment):
    return lambda ck: [ck.tensors.pop(n) for n in list(ck.tensors) if fragment in n]


def change(name, edit):
    """Replace a tensor by ``edit`` of a copy, under the same dtype."""

    def apply(ck):
        dtype = ck.tensors[name][0]
        ck.tensors[name] = stored(edit(ck.array(name).copy()), dtype)

    return apply


def poke(value, *at):
    def edit(a):
        a[at] = value
        return a

    return edit


def config(**values):
    def apply(ck):
        for key, value in values.items():
            where = ck.config if key in ck.config else ck.config["text_config"]
            where[key] = value

    return apply


@functools.cache
def _source(name):
    return Raw.load(checkpoint(name))


def copy_of(name):
    """A checkpoint to bend."""
    source = _source(name)
    return Raw(dict(source.tensors), copy.deepcopy(source.json), dict(source.sidecars))


def broken(corpus, attack, path):
    """Write a checkpoint with the attack applied; returns (path, message)."""
    name, apply, message = corpus[attack]
    ck = copy_of(name)
    apply(ck)
    return ck.write(path), message
