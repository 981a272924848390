"""Writes a synthetic GGUF of the whole model: real names, shapes and sizes, random codes.

    python bench/peers/synthetic_gguf.py OUT.gguf --experts mxfp4 --dense q8_0 [--layers 4]

Blocks are random bytes whose scales keep activations finite; no float weight is ever made. There
is no vocabulary: llama-bench feeds token numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

TYPES = {t.name.lower(): t for t in (Type.MXFP4, Type.Q2_K, Type.Q3_K, Type.Q4_0, Type.Q8_0)}
LAYERS, ATTENTION_EVERY = 40, 4
HIDDEN, INNER, EXPERTS, USED, VOCABULARY = 2048, 512, 256, 8, 248320
HEADS, KV_HEADS, HEAD_DIM = 16, 2, 256
KEY_HEADS, VALUE_HEADS, STATE, TAPS = 16, 32, 128, 4
#: Numbers whose f16 scale sits at these bytes of a block, and what their codes spread by.
_SCALE_AT = {
    Type.Q8_0: (0, 74.0),
    Type.Q4_0: (0, 4.6),
    Type.Q3_K: (108, 42.0),
    Type.Q2_K: (80, 16.0),
}
_POOL = 32771  # random blocks, repeated: a prime, so that no two rows are equal


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: numpy's order of axes; ``fill`` is a standard deviation or a constant."""

    name: str
    shape: tuple[int, ...]
    type: Type
    fill: float | str

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return prod(self.shape) // block * size

    @property
    def token_bytes(self) -> int:
        """Of these, what one decoded token reads."""
        if self.name == "token_embd.weight":
            return 0  # one row
        return self.nbytes * USED // EXPERTS if "_exps" in self.name else self.nbytes


def tensors(experts: str, dense: str, layers: int = LAYERS) -> list[Tensor]:
    """Every tensor of the model; embeddings and head in the dense type."""
    e, d, sigma = TYPES[experts], TYPES[dense], HIDDEN**-0.5
    found = [
        Tensor("token_embd.weight", (VOCABULARY, HIDDEN), d, 1.0),
        Tensor("output_norm.weight", (HIDDEN,), Type.F32, "ones"),
        Tensor("output.weight", (VOCABULARY, HIDDEN), d, sigma),
    ]
    for i in range(layers):
        attention = (i + 1) % ATTENTION_EVERY == 0
        own = _attention(d, sigma) if attention else _delta_net(d, sigma)
        for name, shape, kind, fill in (*own, *_moe(e, d, sigma)):
            found.append(Tensor(f"blk.{i}.{name}", shape, kind, fill))
    return found


def _attention(d: Type, sigma: float) -> Iterator[tuple]:
    yield "attn_q.weight", (2 * HEADS * HEAD_DIM, HIDDEN), d, sigma
    yield "attn_k.weight", (KV_HEADS * HEAD_DIM, HIDDEN), d, sigma
    yield "attn_v.weight", (KV_HEADS * HEAD_DIM, HIDDEN), d, sigma
    yield "attn_output.weight", (HIDDEN, HEADS * HEAD_DIM), d, sigma
    yield "attn_q_norm.weight", (HEAD_DIM,), Type.F32, "ones"
    yield "attn_k_norm.weight", (HEAD_DIM,), Type.F32, "ones"


def _delta_net(d: Type, sigma: float) -> Iterator[tuple]:
    values = VALUE_HEADS * STATE
    channels = 2 * KEY_HEADS * STATE + values
    yield "attn_qkv.weight", (channels, HIDDEN), d, sigma
    yield "attn_gate.weight", (values, HIDDEN), d, sigma
    yield "ssm_conv1d.weight", (channels, TAPS), Type.F32, 0.5
    yield "ssm_dt.bias", (VALUE_HEADS,), Type.F32, 0.5
    yield "ssm_a", (VALUE_HEADS,), Type.F32, "decays"
    yield "ssm_beta.weight", (VALUE_HEADS, HIDDEN), Type.Q8_0, sigma
    yield "ssm_alpha.weight", (VALUE_HEADS, HIDDEN), Type.Q8_0, sigma
    yield "ssm_norm.weight", (STATE,), Type.F32, "ones"
    yield "ssm_out.weight", (HIDDEN, values), d, sigma


def _moe(e: Type, d: Type, sigma: float) -> Iterator[tuple]:
    yield "attn_norm.weight", (HIDDEN,), Type.F32, "ones"
    yield "post_attention_norm.weight", (HIDDEN,), Type.F32, "ones"
    yield "ffn_gate_inp.weight", (EXPERTS, HIDDEN), Type.F32, sigma
    yield "ffn_gate_exps.weight", (EXPERTS, INNER, HIDDEN), e, sigma
    yield "ffn_up_exps.weight", (EXPERTS, INNER, HIDDEN), e, sigma
    yield "ffn_down_exps.weight", (EXPERTS, HIDDEN, INNER), e, sigma
    yield "ffn_gate_inp_shexp.weight", (HIDDEN,), Type.F32, sigma
    yield "ffn_gate_shexp.weight", (INNER, HIDDEN), d, sigma
    yield "ffn_up_shexp.weight", (INNER, HIDDEN), d, sigma
    yield "ffn_down_shexp.weight", (HIDDEN, INNER), d, sigma


class _Bytes:
    """Makes the bytes of tensors."""

    def __init__(self) -> None:
        self._rng, self._pools = np.random.default_rng(0), {}

    def of(self, t: Tensor) -> np.ndarray:
        if t.type != Type.F32:
            key = t.type, t.fill
            if key not in self._pools:
                self._pools[key] = self._blocks(*key).reshape(-1)
            return np.resize(self._pools[key], t.nbytes)
        if t.fill == "ones":
            values = np.ones(t.shape, np.float32)
        elif t.fill == "decays":
            values = -self._rng.uniform(0.05, 8, t.shape).astype(np.float32)
        else:
            values = np.float32(t.fill) * self._rng.standard_normal(t.shape, np.float32)
        return values.reshape(-1).view(np.uint8)

    def _blocks(self, kind: Type, sigma: float) -> np.ndarray:
        """Random blocks whose numbers have about this standard deviation."""
        blocks = self._rng.integers(0, 256, (_POOL, GGML_QUANT_SIZES[kind][1]), np.uint8)
        if kind == Type.MXFP4:
            blocks[:, 0] = 127 + round(np.log2(sigma / 2.9))
            return blocks
        at, spread = _SCALE_AT[kind]
        blocks[:, at : at + 2] = np.float16([sigma / spread]).view(np.uint8)
        if kind == Type.Q2_K:  # the minimum's scale, so that the mean is zero
            blocks[:, at + 2 : at + 4] = np.float16([1.5 * sigma / spread]).view(np.uint8)
        return blocks


def _describe(w: gguf.GGUFWriter, layers: int) -> None:
    w.add_block_count(layers)
    w.add_context_length(262144)
    w.add_embedding_length(HIDDEN)
    w.add_feed_forward_length(INNER)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_key_length(HEAD_DIM)
    w.add_value_length(HEAD_DIM)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_freq_base(1e7)
    w.add_rope_dimension_count(64)
    w.add_rope_dimension_sections([11, 11, 10, 0])
    w.add_expert_count(EXPERTS)
    w.add_expert_used_count(USED)
    w.add_expert_feed_forward_length(INNER)
    w.add_expert_shared_feed_forward_length(INNER)
    w.add_ssm_conv_kernel(TAPS)
    w.add_ssm_state_size(STATE)
    w.add_ssm_group_count(KEY_HEADS)
    w.add_ssm_time_step_rank(VALUE_HEADS)
    w.add_ssm_inner_size(VALUE_HEADS * STATE)
    w.add_full_attention_interval(ATTENTION_EVERY)
    w.add_vocab_size(VOCABULARY)
    w.add_tokenizer_model("none")


def write(path: str, experts: str, dense: str, layers: int = LAYERS) -> dict[str, int]:
    """Write the file; returns bytes in all and bytes of weights a decoded token reads."""
    plan = tensors(experts, dense, layers)
    w = gguf.GGUFWriter(path, "qwen35moe")
    _describe(w, layers)
    for t in plan:
        shape = t.shape
        if t.type == Type.F32:
            w.add_tensor_info(t.name, shape, np.dtype(np.float32), t.nbytes)
        else:  # the writer counts the bytes of a row
            block, size = GGML_QUANT_SIZES[t.type]
            shape = (*shape[:-1], shape[-1] // block * size)
            w.add_tensor_info(t.name, shape, np.dtype(np.uint8), t.nbytes, raw_dtype=t.type)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    values = _Bytes()
    for t in plan:
        w.write_tensor_data(values.of(t))
    w.close()
    return {"bytes": sum(t.nbytes for t in plan), "token_bytes": sum(t.token_bytes for t in plan)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--experts", choices=TYPES, default="mxfp4")
    parser.add_argument("--dense", choices=TYPES, default="q8_0")
    parser.add_argument("--layers", type=int, default=LAYERS)
    args = parser.parse_args()
    size = write(args.out, args.experts, args.dense, args.layers)
    print(f"{args.out}: {size['bytes'] / 1e9:.2f} GB, {size['token_bytes'] / 1e9:.3f} GB a token")


if __name__ == "__main__":
    main()
