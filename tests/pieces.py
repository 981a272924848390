"""A sequence fed to a model piece by piece."""

from __future__ import annotations

import torch


@torch.no_grad()
def in_pieces(model, ids, sizes, past=None, **options):
    """Logits of ids ``[b, t]`` fed through a cache in pieces of so many tokens."""
    out = []
    for piece in ids.split(sizes, 1):
        result = model(piece, past_key_values=past, use_cache=True, **options)
        past = result.past_key_values
        out.append(result.logits)
    return torch.cat(out, 1)
