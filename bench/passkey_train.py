"""Trains a two-layer qwen3_5_moe to recall: the checkpoint in tests/golden/checkpoints/passkey.

    python bench/passkey_train.py OUT [--minutes 25]

A text is records ``KEY:VALUE;`` of random characters, some of them repeated. A value seen before
can be told from its key, which takes attention: the model's one recurrent layer is too small to
hold them. It is trained on nothing else, on one core, and writes the checkpoint in bf16.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
KEY, VALUE = 3, 6
RECORD = KEY + VALUE + 2
CONFIG = {
    "vocab_size": 272, "hidden_size": 128, "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4,
    "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "max_position_embeddings": 32768, "tie_word_embeddings": False, "initializer_range": 0.05,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
        "mrope_section": [3, 3, 2], "mrope_interleaved": True,
    },
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip


def records(rng: np.random.Generator, count: int) -> np.ndarray:
    """u8 ``[count, RECORD]`` of different keys and random values."""
    letters = np.frombuffer(ALPHABET, np.uint8)
    keys = rng.choice(len(letters) ** KEY, count, replace=False)
    out = np.empty((count, RECORD), np.uint8)
    for i in range(KEY):
        out[:, i] = letters[keys // len(letters) ** i % len(letters)]
    out[:, KEY], out[:, -1] = ord(":"), ord(";")
    out[:, KEY + 1 : -1] = rng.choice(letters, (count, VALUE))
    return out


def text(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids i64 ``[length]``, bool ``[length]``: characters that can be known from before)."""
    count = -(-length // RECORD)
    fresh = records(rng, count)
    rows, known, seen = np.empty_like(fresh), np.zeros(fresh.shape, bool), 0
    for i in range(count):
        if seen and rng.random() < 0.5:
            rows[i] = fresh[rng.integers(seen)]
            known[i, KEY + 1 :] = True
        else:
            rows[i], seen = fresh[seen], seen + 1
    return rows.reshape(-1)[:length].astype(np.int64), known.reshape(-1)[:length]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--tokens", type=int, default=4096, help="of a step")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**CONFIG)).float().train()
    print(sum(p.numel() for p in model.parameters()), "parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.01)
    start, step = time.monotonic(), 0
    while (done := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        length = 256 if done < 0.4 else int(rng.choice([256, 512, 1024, 2048]))
        rate = 3e-3 * min(1, step / 50) * min(1, 2 * (1 - done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        pairs = [text(rng, length) for _ in range(max(1, args.tokens // length))]
        ids = torch.tensor(np.stack([p[0] for p in pairs]))
        known = torch.tensor(np.stack([p[1] for p in pairs]))[:, 1:]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits[known], ids[:, 1:][known])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0:
            right = (logits[known].argmax(-1) == ids[:, 1:][known]).float().mean()
            seconds = time.monotonic() - start
            print(f"{step} {seconds:.0f} s length {length} loss {loss:.4f} right {right:.3f}",
                  flush=True)  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(args.out)


if __name__ == "__main__":
    main()
