"""generate() and `hadamoe run` on the simulated GPU: batches, beams, growth, going back, caches."""

from __future__ import annotations

import pytest
import recorded
import torch
from pieces import in_pieces
from simt import cuda, cuda_graph
from typer.testing import CliRunner

import hadamoe
from hadamoe import torch_cuda_cache, torch_cuda_decode, torch_run
from hadamoe.cli import app
from hadamoe.errors import ContractError, UnsupportedError
from hadamoe.torch_cuda_decode import Decoder

pytestmark = [
    pytest.mark.simulator,  # CPU tensors in place of the GPU's
    pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing())),
]
NAME = "stdlib_configi"
PAD = 258


def load(device="cuda", **options):
    return hadamoe.load(recorded.checkpoint(NAME), dtype="float32", device=device, **options)[0]


def ids_of(text):
    return torch.tensor([list(text.encode())])


def greedy(model, ids, count, **options):
    options = {"do_sample": False, "pad_token_id": PAD, "eos_token_id": None} | options
    return model.generate(ids, max_new_tokens=count, **options)


@pytest.fixture(scope="module")
def native():
    return load("cpu")


def test_a_padded_batch(native):
    """Three sequences of different lengths, one graph for all their tokens."""
    texts = ("import os", "def f(", "x = 1")
    ids = torch.tensor([[PAD] * (9 - len(t)) + list(t.encode()) for t in texts])
    mask = (ids != PAD).long()
    want = greedy(native, ids, 4, attention_mask=mask)
    with cuda_graph.installed() as (machine, _):
        got = greedy(load(), ids, 4, attention_mask=mask)
    assert torch.equal(got, want)
    assert len(machine.graphs) == 1


def test_beams_reorder_all_states(native):
    want = greedy(native, ids_of("def f("), 4, num_beams=3)
    with cuda_graph.installed():
        got = greedy(load(), ids_of("def f("), 4, num_beams=3)
    assert torch.equal(got, want)


def test_streaming(native):
    """The same text and, by transformers' way of sampling, the same choice as on the CPU."""
    with cuda_graph.installed():
        model = load()
        for options in ({}, {"temperature": 0.7, "seed": 3}):
            texts = [
                torch_run.stream(m, Bytes(), ids_of("def f("), max_tokens=4, stop=False, **options)
                for m in (model, native)
            ]
            assert texts[0].text == texts[1].text
            assert (texts[0].prompt_tokens, texts[0].new_tokens) == (6, 4)
            assert texts[0].kv == "bf16"


class Bytes:
    """A tokenizer of bytes."""

    def decode(self, ids, **_):
        return bytes(ids).decode("latin-1")


def test_the_command(tmp_path):
    with cuda_graph.installed():
        args = ["run", str(recorded.checkpoint("stdlib_mxfp4")), "-p", "import ", "--max-tokens"]
        result = CliRunner().invoke(app, [*args, "3", "--device", "cuda", "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("import ")
    assert "decode     3 tokens" in result.stderr
    assert "kernels    cuda" in result.stderr


@torch.no_grad()
def test_caches_grow(native, monkeypatch):
    """Past the room there was at first: what is there moves, the graph is recorded anew."""
    monkeypatch.setattr(torch_cuda_cache, "ROOM", 0)
    monkeypatch.setattr(torch_cuda_decode, "RUN", 64)
    ids = torch.arange(1, 67)[None]
    with cuda_graph.installed() as (machine, _):
        got = in_pieces(load(), ids, [61, 1, 1, 1, 1, 1])
    torch.testing.assert_close(got, in_pieces(native, ids, [66]), rtol=0, atol=1e-4)
    assert len(machine.graphs) == 2


def test_an_image():
    """Positions behind an image are fewer than tokens: keys do not go where positions say."""
    made = torch.Generator().manual_seed(0)
    texts = []
    with cuda_graph.installed() as (machine, _):
        for device in ("cpu", "cuda"):
            path = recorded.checkpoint("tqvllm_tiny")
            model, _ = hadamoe.load(path, dtype="float32", device=device)
            vision, image = model.config.vision_config, model.config.image_token_id
            width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
            grid = torch.tensor([[1, 4, 4]])
            pixels = torch.randn(16, width, generator=made.manual_seed(1))
            ids = torch.tensor([[5, model.config.vision_start_token_id, *[image] * 4, 9, 11]])
            given = {"pixel_values": pixels, "image_grid_thw": grid}
            given["mm_token_type_ids"] = (ids == image).int()
            texts.append(greedy(model, ids, 4, **given))
    assert torch.equal(*texts)
    assert [name for name in machine.graphs[0] if name.startswith("kv_append")]


def test_going_back():
    with cuda_graph.installed():
        decoder = Decoder(load(), 64)
        decoder.feed(ids_of("def f"))
        mark = decoder.mark()
        first = [decoder.feed(torch.tensor([[t]])).clone() for t in (40, 41)]
        decoder.rewind(mark)
        again = [decoder.feed(torch.tensor([[t]])).clone() for t in (40, 41)]
        assert all(map(torch.equal, first, again))
        with pytest.raises(ContractError, match="reaches into page 1, raw are page 0, 3 and 4"):
            decoder.batch.kv.check_trim(300, 70)


def test_a_cache_that_is_reset_begins_anew():
    ids = ids_of("x = 12")
    with cuda_graph.installed(), torch.no_grad():
        model = load()
        first = model(ids, use_cache=True)
        model(ids[:, :1], past_key_values=first.past_key_values)
        first.past_key_values.reset()
        again = model(ids, past_key_values=first.past_key_values)
        with pytest.raises(UnsupportedError, match="crop: the states of linear attention"):
            again.past_key_values.crop(-2)
    assert torch.equal(first.logits, again.logits)


def test_the_next_sequence_takes_the_graph_of_the_last():
    """Nothing of the last one is seen."""
    with cuda_graph.installed() as (machine, _):
        model = load()
        texts = [
            torch_run.stream(model, Bytes(), ids_of(text), max_tokens=4, stop=False).text
            for text in ("def f(", "x = 12", "def f(")
        ]
    assert texts[0] == texts[2] != texts[1]
    assert len(machine.graphs) == 1


def test_padding_elsewhere_is_refused():
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with cuda_graph.installed(), pytest.raises(ContractError, match="not in front of its sequence"):
        load()(ids, attention_mask=mask)


def test_an_unknown_preset():
    with cuda_graph.installed(), pytest.raises(ContractError, match="'hk5' is no preset"):
        load(kv="hk5")
