"""mlx-lm's models compiled over a quantized cache: one trace, and the numbers of no trace."""

from __future__ import annotations

import numpy as np
import pytest

from hadamoe.errors import ContractError, UnsupportedError
from hadamoe.kv import PAGE, KVFormat, page_bytes

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (pip install mlx-lm)")
from mlx_lm.models import cache as theirs  # noqa: E402

from hadamoe.mlx_cache import make_prompt_cache  # noqa: E402
from hadamoe.mlx_static import CompiledStep, HadamoeStaticKVCache  # noqa: E402

FORMAT = KVFormat("h4", "h3")
B, G, D = 2, 2, 64


class Toy:
    """Attention over embeddings: as a model to a cache, and quick to compile."""

    def __init__(self):
        self.traced = 0
        rng = np.random.default_rng(0)
        self.embed = mx.array(rng.standard_normal((3, 16, G * D)).astype("f4"))

    def make_cache(self):
        return [theirs.KVCache()]

    def __call__(self, tokens, cache):
        self.traced += 1
        b, n = tokens.shape
        mask = theirs.create_attention_mask(n, cache[0].offset, False, None)
        if n == 1 and hasattr(cache[0], "room"):
            mask = cache[0].make_mask(n)
        q, k, v = (self.embed[i][tokens].reshape(b, n, G, D).swapaxes(1, 2) for i in range(3))
        q, k = (mx.fast.rope(x, D, traditional=False, base=1e4, scale=1.0, offset=cache[0].offset)
                for x in (q, k))  # fmt: skip
        k, v = cache[0].update_and_fetch(k, v)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=D**-0.5, mask=mask)
        return y.swapaxes(1, 2).reshape(b, n, G * D)


@pytest.mark.parametrize("prompt", [1, 63, 64, 100, 128, 190, 192])
def test_a_step_is_compiled_once(prompt):
    """One trace serves every token, over pages' ends; each has the numbers it has uncompiled."""
    tokens = mx.array(np.random.default_rng(prompt).integers(0, 16, (B, prompt + 140)))
    toy = Toy()
    cache = make_prompt_cache(toy, "hk4v3")
    toy(tokens[:, :prompt], cache=cache)
    step = CompiledStep(toy, cache, room=140)
    traced = toy.traced
    for i in range(prompt, prompt + 140):
        got, expected = step(tokens[:, i : i + 1]), toy(tokens[:, i : i + 1], cache=cache)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert toy.traced == traced + 141  # 140 of them not compiled
    with pytest.raises(ContractError, match="CompiledStep: no room is left for a token"):
        step(tokens[:, :1])


def test_compiled_steps_refuse():
    toy, token = Toy(), mx.zeros((1, 1), mx.int32)
    with pytest.raises(ContractError, match="the cache of layer 0 is empty, needs a prompt"):
        CompiledStep(toy, make_prompt_cache(toy, "hk4v3"), 10)
    with pytest.raises(UnsupportedError, match="CompiledStep: layer 0 has a KVCache"):
        CompiledStep(toy, make_prompt_cache(toy, "bf16"), 10)
    cache = make_prompt_cache(toy, "hk4v3")
    toy(token, cache=cache)
    step = CompiledStep(toy, cache, 10)
    with pytest.raises(UnsupportedError, match="2 tokens at once, a static cache takes 1"):
        step(mx.zeros((1, 2), mx.int32))
    static = HadamoeStaticKVCache(cache[0], 65)
    page = sum(page_bytes(c, D) for c in FORMAT)
    assert (static.room, static.nbytes) == (128, G * (2 * 3 * PAGE * D * 4 + 2 * page))
    assert not static.empty()
    again = HadamoeStaticKVCache.from_state(static.state)
    assert (again.format, again.room, again.nbytes) == (FORMAT, 128, static.nbytes)


def test_a_model_is_compiled(checkpoint):
    """The cache it began with, linear attention's too, is left as it is and goes on by itself."""
    model, tokenizer = mlx_lm.load(str(checkpoint("stdlib_bf16")))
    model.set_dtype(mx.float32)  # the CPU has no bf16 mixture of experts
    text = (checkpoint("stdlib_bf16") / "heldout.txt").read_text()
    tokens = mx.array(tokenizer.encode(text[:300]))[None]
    cache = make_prompt_cache(model, "hk4v3")
    model(tokens[:, :290], cache=cache)
    step = CompiledStep(model, cache, room=20)
    for i in range(290, 300):
        expected = model(tokens[:, i : i + 1], cache=cache)
        np.testing.assert_allclose(step(tokens[:, i : i + 1]), expected, rtol=1e-4, atol=1e-4)
