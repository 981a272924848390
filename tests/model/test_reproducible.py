"""The same logits, bit for bit, however a model is run on one instruction set."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from pieces import in_pieces  # noqa: E402

from hadamoe import ops  # noqa: E402
from hadamoe.torch_decode import Decoder  # noqa: E402

NAMES = (
    "stdlib_bf16",
    "stdlib_configi",
    "stdlib_jangtq2",
    "stdlib_mxfp4",
    "stdlib_tq_apex2",
    "stdlib_w4a16",
)
PROMPTS = ("import os\nimport ", "def f(", "class Node:\n    def __init__(self")


def ids_of(text):
    return torch.tensor([list(text.encode())])


@torch.no_grad()
def logits_of(model, ids, **options):
    return model(ids, **options).logits


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", NAMES)
def test_runs_and_threads(name, load):
    model, _ = load(name)
    ids, before = ids_of(PROMPTS[2]), ops.threads()
    want = logits_of(model, ids)
    try:
        for count in (1, 2, 3, 8, 2):
            ops.set_threads(count)
            assert torch.equal(logits_of(model, ids), want)
    finally:
        ops.set_threads(before)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", NAMES)
def test_cuts_of_a_prompt(name, load):
    model, _ = load(name)
    ids = ids_of(PROMPTS[2])
    want, n = logits_of(model, ids), ids.shape[1]
    for sizes in ([1] * n, [7, 1, 13, n - 21], [n - 1, 1]):
        assert torch.equal(in_pieces(model, ids, sizes), want)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", NAMES)
def test_batches(name, load):
    """Alone, among others of its length, and padded in front to the length of others."""
    model, _ = load(name)
    alone = [logits_of(model, ids_of(p)) for p in PROMPTS]
    width = len(PROMPTS[2])
    others = torch.randint(0, 256, (2, width), generator=torch.Generator().manual_seed(0))
    together = logits_of(model, torch.cat([others[:1], ids_of(PROMPTS[2]), others[1:]]))
    assert torch.equal(together[1:2], alone[2])
    ids = torch.stack([torch.tensor([0] * (width - len(p)) + list(p.encode())) for p in PROMPTS])
    mask = torch.stack([torch.arange(width) >= width - len(p) for p in PROMPTS]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = logits_of(model, ids, attention_mask=mask, position_ids=positions)
    for row, p, want in zip(padded, PROMPTS, alone, strict=True):
        assert torch.equal(row[-len(p) :], want[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["stdlib_configi", "stdlib_jangtq2"])
def test_several_blocks_of_keys(name, dtype, load):
    """Contexts of more than one block of 128 keys, where one token's keys are split over threads
    and a cache in 16 bits holds what a prompt's own keys were rounded to."""
    model, _ = load(name, dtype)
    ids = torch.randint(0, 256, (1, 300), generator=torch.Generator().manual_seed(1))
    before, want = ops.threads(), logits_of(model, ids)
    try:
        for count in (1, 3):
            ops.set_threads(count)
            assert torch.equal(in_pieces(model, ids, [3, 130, 100, *[1] * 67]), want)
    finally:
        ops.set_threads(before)
    decoder = Decoder(model, 300)
    decoder.feed(ids[:, :299])
    assert torch.equal(decoder.logits(decoder.feed(ids[:, 299:])), want[0, -1])
