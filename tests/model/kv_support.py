"""What tests of quantized caches share."""

from __future__ import annotations

import torch

NAME = "stdlib_configi"
PROMPT = "class Node:\n    def __init__(self"


def text(n, seed=0):
    """Python-like bytes int64 [1, n]."""
    source = (
        PROMPT + ", value, next):\n        self.value = value\n        self.next = next\n\n"
    ) * 20
    return torch.tensor([list(source.encode()[seed * 7 : seed * 7 + n])])


@torch.no_grad()
def logits_of(model, ids, cache, sizes=None, **options):
    out = [model(part, past_key_values=cache, use_cache=True, **options).logits
           for part in ids.split(sizes or ids.shape[1], 1)]  # fmt: skip
    return torch.cat(out, 1)
