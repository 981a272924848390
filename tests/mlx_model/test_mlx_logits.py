"""mlx-lm's model over our layers, on the CPU: recorded logits and continuations, and torch's."""

from __future__ import annotations

import numpy as np
import pytest
import recorded
from recorded import CONTINUATIONS, DECODE_FROM, LOGITS, TOLERANCE

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
mlx_lm = pytest.importorskip(
    "mlx_lm", reason="mlx-lm is not installed (pip install 'hadamoe[mlx]')"
)

import hadamoe  # noqa: E402

#: two orders of the same f32 sums, over logits up to 20
ROUNDING = 3e-5


def fed(model, ids, sizes):
    """Logits of ids [batch, n] fed through a cache in parts of these sizes."""
    cache, parts, begin = model.make_cache(), [], 0
    for size in sizes:
        parts.append(np.array(model(ids[:, begin : begin + size], cache=cache)))
        begin += size
    return np.concatenate(parts, 1)


@pytest.mark.parametrize("name", LOGITS)
def test_f32_logits(name, load):
    """One forward without a cache: twice as close as promised."""
    model, _ = load(name)
    ids, want, _ = recorded.logits(name)
    got = model(mx.array(ids))
    assert got.dtype == mx.float32
    assert np.abs(np.array(got) - want).max() < TOLERANCE / 2


@pytest.mark.parametrize("name", LOGITS)
def test_chunks_of_a_prompt_and_single_tokens(name, load):
    model, _ = load(name)
    ids, want, decode = recorded.logits(name)
    count = ids.shape[1]
    steps = fed(model, mx.array(ids), [1] * count)
    chunks = fed(model, mx.array(ids), [7, count - 7])
    for got in (steps, chunks):
        assert np.abs(got - want).max() < TOLERANCE
    assert np.abs(steps - chunks).max() < ROUNDING
    if decode is not None:
        steps = steps[:, DECODE_FROM.get(name, 0) :][:, : decode.shape[1]]
        assert np.abs(steps - decode).max() < TOLERANCE


@pytest.mark.parametrize("name", ["configi_tiny", "mxfp4_node_tiny"])
def test_bf16_argmax_on_robust_routing(name, load, golden):
    arrays = golden(f"{name}_robust")
    model, _ = load(name, "bfloat16")
    got = fed(model, mx.array(arrays["tokens"].astype(np.int64)), [arrays["tokens"].shape[1]])
    np.testing.assert_array_equal(got.argmax(-1), arrays["logits_f32"].argmax(-1))
    cache = model.make_cache()
    model(mx.array([[1, 2]]), cache=cache)
    kinds = {str(c.keys.dtype) for c in cache if hasattr(c, "keys")}
    assert kinds == {"mlx.core.bfloat16"}


@pytest.mark.parametrize("name", CONTINUATIONS)
def test_greedy_continuations(name, load):
    """Text that PyTorch's path is tested to write; prompts alone and in one batch. Tokens are
    bytes: stream_generate() leaves out a space in front of its text."""
    model, tokenizer = load(name)
    prompts, want = zip(*CONTINUATIONS[name].items(), strict=True)
    prompts, count = [list(p.encode()) for p in prompts], len(want[0])
    for prompt, text in zip(prompts, want, strict=True):
        tokens = [r.token for r in mlx_lm.stream_generate(model, tokenizer, prompt, count)]
        assert bytes(tokens).decode() == text
    batch = mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=count)
    assert batch.texts == list(want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_yarn_is_torchs(dtype, load, checkpoint):
    """Frequencies, attention factor and logits of a context 256 times as long."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    options = {"dtype": dtype, "rope": "yarn:256"}
    model, _ = load("w4a16_tiny", **options)
    peer, _ = hadamoe.load(checkpoint("w4a16_tiny"), **options)
    rope = next(layer for layer in model.layers if not layer.is_linear).self_attn.rope
    rotary = peer.get_decoder().rotary_emb
    rotary = getattr(rotary, "rotary_emb", rotary)
    np.testing.assert_allclose(1 / np.array(rope._freqs), rotary.inv_freq, rtol=3e-7)
    assert rope.mscale == pytest.approx(rotary.attention_scaling, rel=1e-6)
    ids, *_ = recorded.logits("w4a16_tiny")
    got = np.array(model(mx.array(ids)))
    with torch.no_grad():
        want = peer(torch.from_numpy(ids)).logits.float().numpy()
    assert np.abs(got - want).max() < (ROUNDING if dtype == "float32" else 0.02)
    plain = np.array(load("w4a16_tiny", dtype)[0](mx.array(ids)))
    assert np.abs(got - plain).max() > 0.01
