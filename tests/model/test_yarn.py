"""Contexts past the trained one: rope="yarn:4", angles and logits up to position 1,048,575."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import DynamicCache  # noqa: E402
from transformers.models.qwen3_5_moe import configuration_qwen3_5_moe as c  # noqa: E402
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as hf  # noqa: E402

import hadamoe  # noqa: E402
from hadamoe import formats, torch_run  # noqa: E402
from hadamoe.errors import ContractError  # noqa: E402
from hadamoe.torch_cache import GrowingLayer  # noqa: E402
from hadamoe.torch_decode import Decoder, text_model  # noqa: E402

#: the real model's
REAL = {
    "head_dim": 256, "max_position_embeddings": 262144,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
        "mrope_interleaved": True, "mrope_section": [11, 11, 10],
    },
}  # fmt: skip
CARD = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
REACH = 1 << 20
TINY = "w4a16_tiny"  # trained for 4096 positions, says its config
FACTOR = REACH // 4096


@pytest.fixture(scope="module")
def far(checkpoint):
    return hadamoe.load(checkpoint(TINY), dtype="float32", rope=f"yarn:{FACTOR}")[0]


@pytest.fixture(scope="module")
def in_parts(checkpoint):
    """The same weights, attention and positions as transformers computes them."""
    model, _ = hadamoe.load(checkpoint(TINY), dtype="float32", rope=f"yarn:{FACTOR}")
    for layer in text_model(model).layers:
        layer.mlp.register_forward_hook(lambda *_: None)  # someone listens to a part
        assert layer.in_parts()
    return model


def test_the_short_name_is_what_the_model_card_says():
    config = {"text_config": REAL}
    text = formats.with_rope(config, "yarn:4")["text_config"]
    assert text == formats.with_rope(config, CARD)["text_config"]
    assert text["max_position_embeddings"] == REACH
    again = formats.with_rope({"text_config": text}, "yarn:2.5")["text_config"]
    assert again["rope_parameters"] == REAL["rope_parameters"] | CARD | {"factor": 2.5}
    assert again["max_position_embeddings"] == 655360


@pytest.mark.parametrize("words", ["", "yarn", "yarn:", "yarn:x", "yarn:0.5", "yarn:-4", "ntk:4"])
def test_other_words_are_refused(words):
    with pytest.raises(ContractError) as e:
        formats.with_rope({"text_config": REAL}, words)
    assert str(e.value) == f"rope: {words!r}, needs yarn:FACTOR, FACTOR from 1 to 999"


class Rotary:
    """As much of a model as `Decoder` needs for angles."""

    def __init__(self, config):
        self.layers, self.rotary_emb = [], hf.Qwen3_5MoeTextRotaryEmbedding(config)
        self.model = self.lm_head = None


@pytest.mark.parametrize("begin", [0, 250, 262142, 524288, REACH - 300, REACH - 2])
def test_angles_of_the_real_shape(begin):
    """The decoder's, transformers' own at each position alone, and YaRN's formula in f64."""
    text = formats.with_rope({"text_config": REAL}, "yarn:4")["text_config"]
    rotary = Rotary(c.Qwen3_5MoeTextConfig(**text))
    decoder = Decoder.__new__(Decoder)
    decoder.text, decoder.length, decoder.angles = rotary, begin, None
    cos, sin = decoder._angles(2)
    assert (cos.shape, cos.dtype) == ((1, 2, 64), torch.float32)
    theirs = hf.Qwen3_5MoeTextRotaryEmbedding(c.Qwen3_5MoeTextConfig(**REAL | {
        "rope_parameters": REAL["rope_parameters"] | CARD}))  # fmt: skip
    for i in range(2):
        want = theirs(torch.zeros(1), torch.full((3, 1, 1), begin + i))
        assert torch.equal(cos[:, i : i + 1], want[0])
        assert torch.equal(sin[:, i : i + 1], want[1])
    frequencies, scaling = yarn(theta=1e7, dims=64, factor=4, original=262144)
    angle = (begin + np.arange(2))[:, None] * np.tile(frequencies, 2)
    # the product of position and frequency is f32, in transformers and so here
    allowed = 1e-5 + 1.5 * np.spacing(angle.astype(np.float32)).astype(np.float64)
    assert (abs(cos[0].numpy() - scaling * np.cos(angle)) <= scaling * allowed).all()
    assert (abs(sin[0].numpy() - scaling * np.sin(angle)) <= scaling * allowed).all()


def yarn(theta: float, dims: int, factor: float, original: int) -> tuple[np.ndarray, float]:
    """(frequencies f64 [dims / 2], factor of cos and sin): Peng et al. 2023, beta 32 and 1."""
    plain = theta ** (-np.arange(0, dims, 2) / dims)
    edge = [dims * np.log(original / (2 * np.pi * b)) / (2 * np.log(theta)) for b in (32, 1)]
    low, high = np.floor(edge[0]), np.ceil(edge[1])
    stretched = np.clip((np.arange(dims // 2) - low) / (high - low), 0, 1)
    return plain * (1 - stretched) + plain / factor * stretched, 0.1 * np.log(factor) + 1


IDS = torch.randint(0, 256, (1, 6), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("begin", [0, 4094, 500_000, REACH - 6])
def test_logits_at_far_positions_are_those_of_the_model_in_parts(begin, far, in_parts, load):
    """cos and sin carry YaRN's attention factor into the native call."""
    positions = torch.arange(begin, begin + 6)[None]
    with torch.no_grad():
        got = far(input_ids=IDS, position_ids=positions).logits
        want = in_parts(input_ids=IDS, position_ids=positions).logits
        unscaled = load(TINY)[0](input_ids=IDS, position_ids=positions).logits
    assert got.isfinite().all()
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    assert (got - unscaled).abs().max() > 1e-3  # so the comparison is of something


def test_the_last_tokens_of_a_full_context(far, in_parts):
    """A decoder whose cache holds 1,048,570 tokens, of keys and values 0 but for the last 64."""
    begin = REACH - 6
    decoder, cache = Decoder(far, REACH), DynamicCache(config=in_parts.config.get_text_config())
    generator = torch.Generator().manual_seed(2)
    for i, layer in enumerate(text_model(far).layers):
        if layer.linear:
            continue
        heads, d = layer.mixer.heads
        untouched = np.zeros((2, 1, heads, REACH, d), np.float32)  # takes no memory
        states = torch.from_numpy(untouched)
        states[:, :, :, begin - 64 : begin].normal_(generator=generator)
        decoder.states[i] = (states[0], states[1])
        entry = cache.layers[i] = GrowingLayer()  # of the same memory: both write the same tokens
        entry.room, entry.length = (states[0], states[1]), begin
        entry.lazy_initialization(*states)
    decoder.length = begin
    rows = [decoder.logits(decoder.feed(IDS[:, i : i + 1])) for i in range(6)]
    positions = torch.arange(begin, REACH)[None]
    with torch.no_grad():
        want = in_parts(input_ids=IDS, position_ids=positions, past_key_values=cache).logits[0]
    assert decoder.length == REACH
    assert want.isfinite().all()
    torch.testing.assert_close(torch.stack(rows), want, rtol=0, atol=2e-5)


def test_more_tokens_than_positions_are_refused(far, load):
    model, _ = load(TINY)
    ids = torch.zeros(1, 4000, dtype=torch.int64)
    with pytest.raises(ContractError) as e:
        torch_run.stream(model, None, ids, max_tokens=98)
    assert str(e.value) == (
        "run: 4000 prompt and 98 new tokens take 4097 positions, the model has 4096; "
        "rope='yarn:2' (--rope) has enough"
    )
    with pytest.raises(ContractError, match="the model has 1048576; rope='yarn:257'"):
        torch_run.stream(far, None, ids[:, :1], max_tokens=REACH + 1)
    assert torch_run.generate(model, ids[:, -4:], 2).new_tokens == 2


def test_quantized_pages_hold_keys_of_far_positions(checkpoint, far):
    """Positions are in the keys before they are stored: 8 bits of far ones are as good as near."""
    loaded, _ = hadamoe.load(checkpoint(TINY), dtype="float32", rope=f"yarn:{FACTOR}", kv="hk8v8")
    ids = torch.randint(0, 256, (1, 330), generator=torch.Generator().manual_seed(3))
    typical = []
    for begin in (0, REACH - 330):
        positions = torch.arange(begin, begin + 330)[None]
        with torch.no_grad():
            got, want = (m(input_ids=ids, position_ids=positions).logits for m in (loaded, far))
        error = (got - want).abs().amax((0, 2))
        assert error[:128].max() < 2e-5  # nothing is coded yet
        typical.append(error[128:].median().item())
    near, away = typical
    assert 1e-5 < away < 1.5 * near < 0.02
