"""Sequences on the GPU: prompts in pieces, then a token of each by replaying one CUDA graph.

What a step reads and writes stays in place: tokens, positions, lengths, states, keys and values. So
the launches of a whole token are recorded once, and the token it chooses is what the next step
reads. Only where the cache has to grow are they recorded anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from . import gpu_calls, torch_cuda
from .errors import DeviceError, UnsupportedError
from .torch_cuda_blocks import Pass, Segment
from .torch_cuda_kv import RUN, KVStates
from .torch_decode import text_model
from .torch_kv import KVChoice

Tensor = torch.Tensor

#: Sequences together, at most.
MOST = 64
#: Tokens of a prompt that go through the layers together.
CHUNK = 2048


class Mark(NamedTuple):
    """Where a `Batch` stood."""

    lengths: list[int]
    at: Tensor
    states: list[Tensor]


class Batch:
    """Up to 64 sequences.

    Args:
        text: the text model, with layers of `torch_cuda_blocks`. head: its `Head`.
        count: sequences.
        capacity: tokens of each there is room for at first.
        choice: how keys and values are kept.

    Attributes:
        lengths: tokens of each sequence.
        tokens: i32 ``[b]``, what the next step reads: the likeliest, unless told otherwise.
        logits: f32 ``[b, vocabulary]`` of the last step; the next one overwrites them.

    Raises:
        UnsupportedError: more sequences than 64.
        DeviceError: too little memory is free.
    """

    def __init__(self, text: Any, head: Any, count: int, capacity: int, choice: KVChoice) -> None:
        if not 1 <= count <= MOST:
            raise UnsupportedError(f"a batch of {count} sequences, on CUDA 1 to {MOST}")
        self.text, self.head, self.choice = text, head, choice
        self.device = head.norm.device
        self.lengths = [0] * count
        linear = [layer for layer in text.layers if layer.linear]
        attention = next(layer.mixer for layer in text.layers if not layer.linear)
        self.kv = KVStates(
            choice, attention.heads[0], count, _whole(capacity), attention.dtype,
            _rope(text, self.device),
        )  # fmt: skip
        needs = self.kv.nbytes + count * sum(layer.mixer.state_bytes for layer in linear)
        self._check_memory(needs, "sequences")
        self.kv.allocate()
        self.states = [layer.mixer.states(count) if layer.linear else None for layer in text.layers]
        self.tokens = torch.zeros(count, dtype=torch.int32, device=self.device)
        self.at = torch.zeros((2, count), dtype=torch.int32, device=self.device)
        self.logits: Tensor | None = None
        self._replay, self._recorded, self._warm = None, None, False

    def _check_memory(self, needs: int, what: str) -> None:
        free = torch_cuda.machine.free_bytes(self.device)
        if needs > free:
            raise DeviceError(
                f"{len(self.lengths)} {what} of {self.kv.capacity:,} tokens need {needs / 1e9:.2f} "
                f"GB of GPU memory, {free / 1e9:.2f} GB are free"
            )

    def _reserve(self, more: int) -> None:
        """Room for ``more`` tokens behind the longest sequence."""
        needs = max(self.lengths) + more
        if needs <= self.kv.capacity:
            return
        grown = self.kv.grown(max(_whole(needs), 2 * self.kv.capacity))
        self._check_memory(grown.nbytes, "grown caches")
        grown.allocate()
        grown.copy_from(self.kv)
        self.kv, self._replay = grown, None

    @torch.no_grad()
    def prompt(self, x: Tensor, positions: Tensor, counts: Sequence[int]) -> Tensor:
        """Takes ``counts`` tokens of the sequences, one sequence behind the other.

        Args:
            x: f32 ``[n, hidden]``, their embeddings.
            positions: integers ``[3, n]``: in time, height and width.

        Returns:
            Hidden states f32 ``[n, hidden]``, not yet normed.
        """
        self._reserve(max(counts))
        ends = torch.tensor(counts).cumsum(0).tolist()
        done = []
        for begin in range(0, len(x), CHUNK):
            end = min(begin + CHUNK, len(x))
            segments = []
            for i, (last, count) in enumerate(zip(ends, counts, strict=True)):
                a, b = max(begin, last - count), min(end, last)
                if a < b:
                    past = self.lengths[i] + a - (last - count)
                    segments.append(Segment(i, a - begin, b - begin, past))
            done.append(self._pass(x[begin:end], positions[:, begin:end], segments))
        for i, (last, count) in enumerate(zip(ends, counts, strict=True)):
            self.lengths[i] += count
            if count:
                self.at[0, i] = positions[:, last - count : last].amax() + 1
        self.at[1] = torch.tensor(self.lengths, dtype=torch.int32)
        placed = bool(torch.equal(self.at[0], self.at[1]))
        if placed != self.kv.placed:
            self.kv.placed, self._replay = placed, None
        return done[0] if len(done) == 1 else torch.cat(done)

    def _pass(self, x: Tensor, positions: Tensor, segments: list[Segment]) -> Tensor:
        numbers = torch.zeros((2, len(self.lengths)), dtype=torch.int32)
        for s in segments:
            numbers[:, s.sequence] = torch.tensor([s.past, s.end - s.begin])
        cos, sin = self.text.rotary_emb(x, positions[:, None])
        now = Pass(segments, len(self.lengths), (cos[0], sin[0]), *numbers.to(self.device))
        for layer, states in zip(self.text.layers, self.states, strict=True):
            x = layer.mlp(layer.mixer.prompt(x, now, self.kv if states is None else states))
        return x

    @torch.no_grad()
    def step(self, tokens: Tensor | None = None) -> Tensor:
        """The next token of every sequence, its position one after the last; logits f32
        ``[b, vocabulary]``.

        tokens: integers ``[b]``; None: the likeliest ones of the last step.
        """
        self._reserve(1)
        if tokens is not None:
            self.tokens.copy_(tokens)
        if self._replay is None and self._warm:
            self._replay = torch_cuda.machine.capture(self.record, self.device)
            self._recorded = self.logits
        if self._replay is not None:
            self._replay()
            self.logits = self._recorded  # a prompt left its own there
        else:  # what CUDA and torch do but once must not happen while a graph is recorded
            self.record()
            self._warm = True
        self.lengths = [n + 1 for n in self.lengths]
        return self.logits

    def record(self) -> None:
        """The launches of a step."""
        x = self.text.embed_tokens(self.tokens)
        for layer, states in zip(self.text.layers, self.states, strict=True):
            kept = (self.at, self.kv) if states is None else states
            x = layer.mlp(layer.mixer.step(x, *kept))
        self.logits = self.head.logits(x)
        self.choose()
        self.at.add_(1)

    def choose(self) -> None:
        """Makes the likeliest tokens what the next step reads."""
        front = torch_cuda.front(self.device)
        gpu_calls.largest(front, self.logits, 1, index=self.tokens[:, None])

    def recurrent(self) -> list[Tensor]:
        """Conv windows and states of the linear layers."""
        return [a for states in self.states if states is not None for a in states]

    def select(self, rows: Tensor) -> None:
        """Keeps these sequences, in this order: integers ``[b]``."""
        rows = rows.to(self.device, torch.int64)
        self.lengths = [self.lengths[i] for i in rows.tolist()]
        if len(rows) > MOST:
            raise UnsupportedError(f"a batch of {len(rows)} sequences, on CUDA 1 to {MOST}")
        same = len(rows) == len(self.tokens)
        pick = (lambda a, dim: a.copy_(a.index_select(dim, rows))) if same else (
            lambda a, dim: a.index_select(dim, rows)
        )  # fmt: skip
        self.tokens, self.at = pick(self.tokens, 0), pick(self.at, 1)
        self.states = [s and tuple(pick(a, 0) for a in s) for s in self.states]
        self.kv.select(pick, len(rows))
        if not same:
            self._replay, self._warm = None, False

    def reset(self) -> None:
        """Forgets everything; memory and graph stay."""
        self.lengths = [0] * len(self.lengths)
        for a in (self.at, *self.recurrent()):
            a.zero_()

    def mark(self) -> Mark:
        """What `rewind` needs to come back here."""
        return Mark(list(self.lengths), self.at.clone(), [a.clone() for a in self.recurrent()])

    def rewind(self, mark: Mark) -> None:
        """Forgets all tokens since the mark.

        Raises:
            ContractError: they reach back to where tokens are no longer raw.
        """
        for now, then in zip(self.lengths, mark.lengths, strict=True):
            self.kv.check_trim(now, then)
        self.lengths = list(mark.lengths)
        self.at.copy_(mark.at)
        for a, known in zip(self.recurrent(), mark.states, strict=True):
            a.copy_(known)

    def kept(self) -> tuple[str, int, int]:
        """How keys and values are kept, bytes of a token's, bytes of those there are."""
        return self.choice.name, self.kv.token_bytes, self.kv.token_bytes * sum(self.lengths)


def batch_of(text: Any, head: Any, count: int, capacity: int, choice: KVChoice) -> Batch:
    """A `Batch` with room for so much: the one that was used last, emptied, if it fits, for its
    graph is recorded; else a new one."""
    spare, text.spare = text.spare, None
    fits = spare is not None and spare.choice is choice and len(spare.lengths) == count
    if fits and spare.kv.capacity >= capacity:
        spare.reset()
        return spare
    del spare  # its memory is free before new memory is taken
    return Batch(text, head, count, capacity, choice)


def _whole(tokens: int) -> int:
    """A capacity: whole runs of pages."""
    return -(-tokens // RUN) * RUN


def _rope(text: Any, device: torch.device) -> tuple[Tensor, float]:
    """Radians a position f32 ``[rotary / 2]`` and the factor of cosines and sines."""
    rotary = text.rotary_emb
    return rotary.inv_freq.to(device, torch.float32), float(rotary.attention_scaling)


class Decoder:
    """One sequence, as `torch_decode.Decoder`.

    Args:
        model: from `hadamoe.load` with device="cuda".
        capacity: tokens it will ever hold.
    """

    prefix = None

    def __init__(self, model: Any, capacity: int, kv: str | KVChoice | None = None) -> None:
        choice = choice_of(model, kv)
        self.text, self.head = text_model(model), model.lm_head
        self.batch = batch_of(self.text, self.head, 1, capacity, choice)

    def __del__(self) -> None:
        if hasattr(self, "batch"):
            self.text.spare = self.batch

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether no hook of a layer is to be called."""
        return not any(
            part._forward_hooks or part._forward_pre_hooks for part in text_model(model).modules()
        )

    @property
    def length(self) -> int:
        """Tokens it holds."""
        return self.batch.lengths[0]

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        """Takes ids ``[1, t]``; logits f32 ``[1, vocabulary]`` of the last."""
        batch, ids = self.batch, ids.to(self.batch.device)
        if ids.shape[1] == 1 and self.length:
            return batch.step(ids[0])
        positions = torch.arange(self.length, self.length + ids.shape[1], device=ids.device)
        x = batch.prompt(self.text.embed_tokens(ids[0]), positions.expand(3, -1), [ids.shape[1]])
        batch.logits = self.head.logits(x[-1:])
        return batch.logits

    prompt = feed

    def top(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` largest logits of `feed`'s result and their tokens ``[count]``."""
        values, index = x[0].topk(count)
        return values, index

    def logits(self, x: Tensor) -> Tensor:
        """All logits f32 [vocabulary] of `feed`'s result."""
        return x[0]

    def greedy(self, ids: Tensor) -> Iterator[int]:
        """The likeliest tokens after a prompt ``[1, t]``, without end. Each is read while the next
        one is computed."""
        batch = self.batch
        self.feed(ids)
        batch.choose()
        read = torch_cuda.machine.reader(batch.tokens)
        coming = read(batch.tokens)
        while True:
            now = coming
            batch.step()
            coming = read(batch.tokens)
            yield int(now())

    def mark(self) -> Mark:
        """What `rewind` needs to come back here."""
        return self.batch.mark()

    def rewind(self, mark: Mark) -> None:
        """Forgets all tokens since the mark, as `Batch.rewind`."""
        self.batch.rewind(mark)

    def kept(self) -> tuple[str, int, int]:
        """How keys and values are kept, bytes of a token's, bytes in use."""
        return self.batch.kept()


def choice_of(model: Any, kv: str | KVChoice | None) -> KVChoice:
    """How a model's cache is to be: kv, or what it was loaded with.

    Raises:
        UnsupportedError: it asks for what is not there on CUDA.
    """
    choice = model.kv_choice
    if isinstance(kv, KVChoice):
        choice = kv
    elif kv is not None:
        choice = KVChoice.of(model.config, kv, scales=model.kv_scales)
    for name in ("window", "tokens", "vectors"):
        if getattr(choice, name) is not None:
            raise UnsupportedError(f"kv: {name} is not there for device='cuda'")
    return choice
