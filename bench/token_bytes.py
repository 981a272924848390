"""What a decoded token reads of the full model's weights."""

from __future__ import annotations


def weight_bytes(name: str) -> float:
    """Bytes of weights that a token reads from the full model in a format."""
    from hadamoe import synth
    from hadamoe.synth.shape import Matrix, text_model

    shape, total = synth.PRESETS["full"], 0.0
    for p in text_model(shape):
        stored = sum(t.nbytes for t in synth.FORMATS[name].table(p, shape))
        if isinstance(p, Matrix) and p.routed:
            stored *= shape.top_k / shape.experts
        total += stored / shape.vocab if p.path == "embed_tokens" else stored
    return total
