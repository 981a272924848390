"""Generating text as a stream, scoring text, and what both cost."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from transformers import DynamicCache

from .errors import ContractError, UnsupportedError
from .kv_prefix import PrefixCache
from .torch_cuda_cache import BatchLayer
from .torch_cuda_decode import Decoder as CudaDecoder
from .torch_cuda_model import TextModel
from .torch_decode import BY_LENGTH, Decoder, text_model
from .torch_kv import kept

__all__ = ["Generation", "bits_per_byte", "encode", "generate", "resident_bytes", "stream"]


def resident_bytes() -> int:
    """RAM this process holds, mapped file pages included; its peak where the OS tells no more."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_bytes()


def peak_bytes() -> int:
    """The most RAM this process has held, mapped file pages included."""
    try:  # getrusage's figure survives exec: a large parent would count
        with open("/proc/self/status") as f:
            return next(int(x.split()[1]) * 1024 for x in f if x.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_memory(model: Any) -> int:
    """Bytes of GPU memory that torch holds for a model and its sequences; 0 on other devices."""
    device = model.device
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """torch's own thread pool at rest: it has the small operations between ours, and two pools
    that spin for the same cores cost a decoded token several times its work on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(slots=True)
class Generation:
    """One generated text and its timing.

    Attributes:
        prompt_tokens, new_tokens: counts. text: what was generated.
        prefill_seconds: until the first new token. decode_seconds: from the first to the last.
        kv: how keys and values were kept. token_bytes, kv_bytes: of a token's, and of all.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    text: str = ""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    kv: str = ""
    token_bytes: int = 0
    kv_bytes: int = 0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first; 0 where only one was generated."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(slots=True)
class _Streamer:
    """What transformers' generate() hands tokens to: first the prompt, then one token a call."""

    decode: Callable[[list[int]], str] | None
    on_text: Callable[[str], None]
    result: Generation
    start: float
    first: float = 0.0
    pending: list[int] = field(default_factory=list)

    def put(self, value: torch.Tensor) -> None:
        now, r = time.perf_counter(), self.result
        if not r.prompt_tokens:
            r.prompt_tokens = value.numel()
            return
        r.new_tokens += 1
        if r.new_tokens == 1:
            self.first, r.prefill_seconds = now, now - self.start
        r.decode_seconds = now - self.first
        self.pending += value.reshape(-1).tolist()
        self._flush(final=False)

    def end(self) -> None:
        self._flush(final=True)

    def _flush(self, final: bool) -> None:
        if self.decode is None or not self.pending:
            return
        text = self.decode(self.pending)
        # A character may span tokens: hold back until its last byte is there.
        if text.endswith("\ufffd") and not final and len(self.pending) < 8:
            return
        self.pending.clear()
        self.result.text += text
        self.on_text(text)


def encode(tokenizer: Any, prompt: str, chat: bool = False) -> torch.Tensor:
    """Token ids int64 ``[1, t]`` of a prompt; ``chat`` wraps it in the tokenizer's chat template.

    Raises:
        ContractError: no tokenizer, no chat template, or an empty prompt.
    """
    if tokenizer is None:
        raise ContractError("run: the checkpoint has no tokenizer, cannot read a text prompt")
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ContractError("run: the checkpoint's tokenizer has no chat template")
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise ContractError("run: prompt is empty, needs at least one token")
    return ids.to(torch.int64)


def stream(
    model: Any,
    tokenizer: Any,
    prompt: str | torch.Tensor,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    chat: bool = False,
    stop: bool = True,
    prefix: PrefixCache | None = None,
    on_text: Callable[[str], None] = lambda _: None,
) -> Generation:
    """Generate from a prompt, handing text on as it appears.

    Args:
        prompt: text, or token ids int64 ``[1, t]``.
        temperature: 0 takes the likeliest token each time.
        seed: of the sampling; None leaves the global generator alone.
        stop: False ignores the end-of-text token, for measurements.
        prefix: of `torch_decode.prefix_cache`: a prompt that begins as an earlier one, or as its
            answer, goes on from there with the same bits, and is remembered itself.

    Raises:
        ContractError: a prompt that cannot be encoded, options out of range, or more tokens than
            the model has positions.
    """
    if max_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ContractError(
            f"run: max_tokens={max_tokens} temperature={temperature} top_p={top_p}, "
            "needs max_tokens >= 1, temperature >= 0, 0 < top_p <= 1"
        )
    ids = encode(tokenizer, prompt, chat) if isinstance(prompt, str) else prompt
    _check_reach(model, ids.shape[1], max_tokens)
    if seed is not None:
        torch.manual_seed(seed)
    result = Generation()
    decode = None
    if tokenizer is not None:
        decode = lambda pending: tokenizer.decode(pending, skip_special_tokens=True)  # noqa: E731
    with one_torch_thread():
        streamer = _Streamer(decode, on_text, result, time.perf_counter())
        on_cuda = isinstance(text_model(model), TextModel)
        if on_cuda and prefix is not None:
            raise UnsupportedError("run: a prefix cache is not there for device='cuda'")
        if _ours(model, ids):
            pick = _Pick(model.generation_config.top_k, temperature, top_p)
            reach = ids.shape[1] + max_tokens
            decoder = CudaDecoder(model, reach) if on_cuda else Decoder(model, reach, prefix=prefix)
            tokens, ends = _tokens(decoder, ids, pick), _ends(model) if stop else set()
            _stream_natively(decoder, ids, max_tokens, tokens, ends, streamer)
            result.kv, result.token_bytes, result.kv_bytes = decoder.kept()
            return result
        if prefix is not None:
            raise UnsupportedError("run: a prefix cache needs one sequence and plain sampling")
        sampling: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            sampling |= {"temperature": temperature, "top_p": top_p}
        if not stop:
            sampling |= {"eos_token_id": None, "min_new_tokens": max_tokens}
        ids = ids.to(model.device)
        mask = torch.ones_like(ids)
        cache = DynamicCache(config=model.config)
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, streamer=streamer,
            past_key_values=cache, **sampling,
        )  # fmt: skip
        first = cache.layers[0]
        ours = first.shared.batch.kept() if isinstance(first, BatchLayer) else None
        result.kv, result.token_bytes, result.kv_bytes = ours or kept(cache, model.kv_choice)
    return result


def _check_reach(model: Any, prompt: int, new: int) -> None:
    """Raises where tokens would lie past the positions that the model's rope is made for."""
    config = model.config.get_text_config()
    reach, needs = config.max_position_embeddings, prompt + new - 1  # the last is never fed
    if needs > reach and config.rope_parameters["rope_type"] not in BY_LENGTH:
        original = config.rope_parameters.get("original_max_position_embeddings", reach)
        raise ContractError(
            f"run: {prompt} prompt and {new} new tokens take {needs} positions, the model has "
            f"{reach}; rope='yarn:{-(-needs // original)}' (--rope) has enough"
        )


#: What a checkpoint's generation config may ask for that only transformers' generate() does.
_ONLY_THEIRS = (
    "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "encoder_repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "force_words_ids",
    "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
    "sequence_bias", "guidance_scale", "penalty_alpha", "watermarking_config", "stop_strings",
    "max_time", "exponential_decay_length_penalty", "min_new_tokens",
)  # fmt: skip


def _ours(model: Any, ids: torch.Tensor) -> bool:
    """Whether `Decoder` gives what transformers' generate() would: one sequence, plain sampling."""
    asked = model.generation_config.to_diff_dict()
    wants = any(asked.get(name) not in (None, 0, 1.0) for name in _ONLY_THEIRS)  # 1: no penalty
    kind = CudaDecoder if isinstance(text_model(model), TextModel) else Decoder
    return len(ids) == 1 and kind.fits(model) and not wants


class _Pick:
    """Chooses tokens as transformers' warpers do: temperature, top k, top p, in this order."""

    def __init__(self, top_k: int | None, temperature: float, top_p: float) -> None:
        self.top_k = 50 if top_k is None else top_k  # transformers' default
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, decoder: Decoder | CudaDecoder, x: torch.Tensor) -> int:
        if not self.temperature:
            return int(decoder.top(x, 1)[1])
        if self.top_k:
            values, index = decoder.top(x, min(self.top_k, decoder.head.out_features))
        else:  # only all logits tell what a token's share is
            values, index = decoder.logits(x).sort(descending=True, stable=True)
        p = (values / self.temperature).softmax(-1)
        if self.top_p < 1:
            rest = p.flip(0).cumsum(0).flip(0)  # of a token and all less likely ones
            rest[0] = 1  # the likeliest always stays
            p = torch.where(rest > 1 - self.top_p, p, 0)
        return int(index[torch.multinomial(p, 1)])


def _stream_natively(
    decoder: Decoder | CudaDecoder, ids: torch.Tensor, count: int, tokens: Iterator[int],
    ends: set[int], streamer: _Streamer,
) -> None:  # fmt: skip
    streamer.put(ids)
    for token in islice(tokens, count):
        streamer.put(torch.tensor([[token]]))
        if token in ends:
            break
    if decoder.prefix is not None:
        decoder.remember()
    streamer.end()


def _tokens(decoder: Decoder | CudaDecoder, ids: torch.Tensor, pick: _Pick) -> Iterator[int]:
    """What follows a prompt, without end; a token is fed when the next one is asked for."""
    if isinstance(decoder, CudaDecoder) and not pick.temperature:
        yield from decoder.greedy(ids)
    x, one = decoder.prompt(ids), torch.empty(1, 1, dtype=torch.int64)
    while True:
        token = pick(decoder, x)
        yield token
        x = decoder.feed(one.fill_(token))


def _ends(model: Any) -> set[int]:
    eos = model.generation_config.eos_token_id
    return {eos} if isinstance(eos, int) else set(eos or ())


def generate(model: Any, ids: Any, new_tokens: int) -> Generation:
    """Exactly ``new_tokens`` likeliest tokens after integer ids ``[1, t]``; for measurements."""
    ids = torch.as_tensor(ids, dtype=torch.int64)
    return stream(model, None, ids, max_tokens=new_tokens, stop=False)


@torch.no_grad()
def bits_per_byte(model: Any, data: bytes, window: int = 1024, batch: int = 4) -> float:
    """Mean -log2 p of each byte under a byte-level model (token id = byte value).

    Windows start from an empty state; the first byte of each is not scored.
    """
    nats, scored = 0.0, 0
    windows = [data[i : i + window] for i in range(0, len(data), window)]
    groups = [windows[i : i + batch] for i in range(0, len(windows), batch)]
    if groups and len({len(w) for w in groups[-1]}) > 1:  # a shorter last window goes by itself
        groups[-1:] = [groups[-1][:-1], groups[-1][-1:]]
    for group in groups:
        if len(group[0]) < 2:
            continue
        ids = torch.tensor([list(w) for w in group])
        with one_torch_thread():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
        nats -= logp.double().sum().item()
        scored += logp.numel()
    if not scored:
        raise ContractError(f"bits_per_byte: data has {len(data)} bytes, needs at least 2")
    return nats / scored / 0.6931471805599453
