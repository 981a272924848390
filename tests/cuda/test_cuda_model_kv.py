"""What a model on the simulated GPU keeps of keys and values, for every preset."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from simt import cuda, cuda_graph

from hadamoe.kv import PRESETS, formats_of
from hadamoe.kv_ops import kv_decode, kv_encode
from hadamoe.torch_cuda_kv import KVStates
from hadamoe.torch_kv import KVChoice

pytestmark = [
    pytest.mark.simulator,  # CPU tensors in place of the GPU's
    pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing())),
]
G, H, D, ROTARY = 1, 4, 64, 16


def states(kv, lengths):
    """`KVStates` of one layer with random tokens, and these tokens ``[2, b, g, t, d]``."""
    freqs = torch.rand(ROTARY // 2)
    choice = KVChoice(1, G, D, kv)
    made = KVStates(choice, H, len(lengths), 512, torch.float32, (freqs, 1.0))
    made.allocate()
    kept = torch.randn(2, len(lengths), G, max(lengths), D)
    for begin in range(0, max(lengths), 100):  # in pieces, each sequence's tokens at the end
        piece = kept[:, :, :, begin : begin + 100]
        counts = [min(piece.shape[3], max(0, n - begin)) for n in lengths]
        padded = torch.zeros_like(piece)
        for i, n in enumerate(counts):
            padded[:, i, :, piece.shape[3] - n :] = piece[:, i, :, :n]
        before = [min(begin, n) for n in lengths]
        numbers = (torch.tensor(a, dtype=torch.int32) for a in (before, counts))
        made.append(0, padded, *numbers)
    return made, kept


@pytest.mark.parametrize("kv", PRESETS)
def test_what_is_past(kv):
    """Page 0 and the open page as they came, the others as the CPU would store them."""
    torch.manual_seed(0)
    lengths = (200, 70)
    with cuda_graph.installed():
        made, kept = states(kv, lengths)
        got = [made.past(0, i, n) for i, n in enumerate(lengths)]
    (form,) = formats_of(kv, 1)
    for i, n in enumerate(lengths):
        for side, name in enumerate(("key", "value")):
            want = kept[side, i, :, :n].clone()
            for begin in range(64, n // 64 * 64, 64):
                rows = np.ascontiguousarray(want[:, begin : begin + 64].numpy())
                pages = kv_encode(rows, form[side], side=name)
                found = kv_decode(pages, form[side], D, side=name)
                want[:, begin : begin + 64] = torch.from_numpy(found)
            torch.testing.assert_close(got[i][side], want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kv", PRESETS)
def test_a_token_over_coded_pages(kv):
    """Attention of the next token is that over what is past, but for queries and weights rounded to
    integers and what codes lose (`reference_kv`), which the kernels' own tests know to the bit."""
    torch.manual_seed(1)
    lengths = (200, 70)
    norms, at = (torch.ones(D), torch.ones(D)), torch.tensor([lengths] * 2, dtype=torch.int32)
    proj = torch.randn(2, (2 * H + 2 * G) * D)
    with cuda_graph.installed():
        made, _ = states(kv, lengths)
        got = made.attend(0, proj, norms, 1e-6, at)
        past = [made.past(0, i, n + 1) for i, n in enumerate(lengths)]
    angles = at[0][:, None] * made.rope[0][None].repeat(1, 2)
    q, gate = proj[:, : 2 * H * D].reshape(2, H, 2, D).unbind(2)
    q = torch.nn.functional.rms_norm(q, (D,), eps=1e-6)
    a, b = q[..., : ROTARY // 2], q[..., ROTARY // 2 : ROTARY]
    turned = torch.cat([-b, a], -1) * angles.sin()[:, None]
    q = torch.cat([q[..., :ROTARY] * angles.cos()[:, None] + turned, q[..., ROTARY:]], -1)
    for i, (keys, values) in enumerate(past):
        weights = (q[i] @ keys[0].T * D**-0.5).softmax(-1)
        want = (weights @ values[0]) * gate[i].sigmoid()
        torch.testing.assert_close(got[i].view(H, D), want, rtol=0, atol=0.05)
