"""Logits and continuations against those the formats' own tools, or exact decoding, recorded."""

from __future__ import annotations

import numpy as np
import pytest
import recorded
from recorded import CONTINUATIONS, DECODE_FROM, LOGITS, TOLERANCE

torch = pytest.importorskip("torch")

from pieces import in_pieces  # noqa: E402


def recorded_of(name):
    """`recorded.logits` with torch's token ids."""
    ids, *logits = recorded.logits(name)
    return torch.from_numpy(ids), *logits


def close(got, want, tolerance=TOLERANCE):
    worst = np.abs(got.numpy().astype(np.float64) - np.asarray(want)).max()
    assert worst <= tolerance, f"logits differ by {worst:.3g}, allowed {tolerance}"


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", LOGITS)
def test_f32_logits(name, load):
    """On every instruction set, and twice as close as promised: half of what is left is the
    rounding of the recorded f32 logits themselves."""
    model, _ = load(name)
    ids, want, _ = recorded_of(name)
    with torch.no_grad():
        got = model(ids).logits
    assert got.dtype == torch.float32
    close(got, want, TOLERANCE / 2)


@pytest.mark.parametrize("name", LOGITS)
def test_one_forward_equals_token_by_token(name, load):
    """Bit for bit; test_reproducible.py cuts in more ways."""
    model, _ = load(name)
    ids, _, want = recorded_of(name)
    steps = in_pieces(model, ids, 1)
    with torch.no_grad():
        whole = model(ids).logits
        split = model(ids[:, :7], use_cache=True)
        rest = model(ids[:, 7:], past_key_values=split.past_key_values).logits
    assert torch.equal(steps, whole)
    assert torch.equal(torch.cat([split.logits, rest], 1), whole)
    if want is not None:
        first = DECODE_FROM.get(name, 0)
        close(steps[:, first : first + want.shape[1]], want)


@pytest.mark.parametrize("name", ["configi_tiny", "mxfp4_node_tiny"])
def test_bf16_argmax_on_robust_routing(name, load, golden):
    arrays = golden(f"{name}_robust")
    model, _ = load(name, "bfloat16")
    with torch.no_grad():
        got = model(torch.from_numpy(arrays["tokens"]).long()).logits
    np.testing.assert_array_equal(got.argmax(-1).numpy(), arrays["logits_f32"].argmax(-1))


@pytest.mark.parametrize("name", ["configi_tiny", "mxfp4_node_tiny", "w4a16_tiny"])
def test_same_experts_as_recorded(name, load, golden):
    model, _ = load(name)
    with torch.no_grad():
        routers = model(recorded_of(name)[0], output_router_logits=True).router_logits
    k = model.config.get_text_config().num_experts_per_tok
    got = torch.stack(routers).topk(k, -1).indices.sort(-1).values
    np.testing.assert_array_equal(got.numpy(), golden("routing")[name])


@pytest.mark.parametrize("name", CONTINUATIONS)
def test_greedy_continuation(name, load):
    """All prompts in one left-padded batch."""
    model, _ = load(name)
    prompts, want = zip(*CONTINUATIONS[name].items(), strict=True)
    width = max(map(len, prompts))
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    ids = torch.tensor([[0] * (width - len(p)) + list(p.encode()) for p in prompts])
    got = greedy(model, ids, len(want[0]), attention_mask=mask)
    assert [bytes(row.tolist()).decode() for row in got] == list(want)


def greedy(model, ids, count, **options):
    out = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, **options)
    return out[:, ids.shape[1] :]


def test_greedy_continuation_jangtq(load, golden):
    arrays = golden("jangtq_tiny_logits")
    model, _ = load("jangtq_tiny")
    want = arrays["greedy16_from_first16_hf_roundednorms"]
    ids = torch.from_numpy(arrays["input_ids"][:, :16]).long()
    np.testing.assert_array_equal(want[0, :16], ids[0])
    np.testing.assert_array_equal(greedy(model, ids, 16), want[:, 16:])
