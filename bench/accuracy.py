"""How far a model's f32 logits are from exact ones, on every instruction set.

    python bench/accuracy.py CHECKPOINT [CHECKPOINT ...]      small checkpoints: everything is dense

The yardstick is transformers' own model in f64: its source with every f32 made f64, over weights
decoded and rotated back in f64.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types

import numpy as np
import torch
from transformers import Qwen3_5MoeConfig
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as hf

import hadamoe
from hadamoe import formats, ops
from hadamoe.weight import Rotation, Weight

TOKENS = 40


def modeling_f64() -> types.ModuleType:
    """transformers' model with f64 wherever it asks for f32."""
    source = inspect.getsource(hf)
    for old, new in (
        (".float()", ".double()"),
        ("torch.float32", "torch.float64"),
        ("torch.float)", "torch.float64)"),
        ("from ... import", "from transformers import"),
        ("from ...", "from transformers."),
        ("from .configuration", "from transformers.models.qwen3_5_moe.configuration"),
    ):
        source = source.replace(old, new)
    module = types.ModuleType("modeling_f64")
    module.__file__, module.__package__ = hf.__file__, hf.__package__
    sys.modules[module.__name__] = module
    exec(compile(source, hf.__file__, "exec"), module.__dict__)
    return module


def hadamard(n: int) -> np.ndarray:
    """The orthonormal Hadamard matrix of a power of two, natural order."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(n)


def rotate_back(rows: np.ndarray, r: Rotation) -> np.ndarray:
    """pre * H(post * rows) in f64."""
    n = rows.shape[1]
    powers = [1 << i for i in reversed(range(n.bit_length())) if n >> i & 1]
    pre, post = (1 if s is None else np.resize(s, n) for s in (r.pre, r.post))
    rows, out, at = rows * post, np.empty_like(rows), 0
    for block in [r.block] * (n // r.block) if r.block else powers:
        out[:, at : at + block] = rows[:, at : at + block] @ hadamard(block)
        at += block
    return pre * out


def dense(w: Weight) -> torch.Tensor:
    """A stored matrix in f64, ``[experts *] rows, in_features``."""
    stored = dataclasses.replace(w, rotation=None, in_features=w.columns)
    rows = ops.dequantize(stored).astype(np.float64)
    rows = rows if w.rotation is None else rotate_back(rows, w.rotation)
    return torch.from_numpy(np.ascontiguousarray(rows[:, : w.in_features]))


def exact_logits(path: str, ids: torch.Tensor) -> np.ndarray:
    """f64 logits of the whole model."""
    files = formats.read(path)
    config = Qwen3_5MoeConfig(**files.config).get_text_config()
    config._attn_implementation = config._experts_implementation = "eager"
    torch.set_default_dtype(torch.float64)
    model = modeling_f64().Qwen3_5MoeForCausalLM(config).double().eval()
    values = {}
    for name in model.state_dict():
        key = name.removeprefix("model.").removesuffix(".weight")
        key = key.removesuffix("_proj") if ".mlp.experts." in key else key
        if key in files.weights:
            w = files.weights[key]
            values[name] = dense(w).reshape(*((w.experts,) if w.experts > 1 else ()), w.rows, -1)
            continue
        t = torch.from_numpy(np.array(files.tensors[key], np.float64))
        zero_centred = "norm" in key and not key.endswith("linear_attn.norm")
        values[name] = t[:, None] if key.endswith("conv1d") else t - 1 if zero_centred else t
    model.load_state_dict(values)
    with torch.no_grad():
        logits = model(ids).logits.numpy()
    torch.set_default_dtype(torch.float32)
    return logits


def main() -> None:
    for path in sys.argv[1:]:
        model, _ = hadamoe.load(path, dtype="float32")
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.arange(3, 3 + 7 * TOKENS, 7)[None] % (vocabulary - 16)
        want = exact_logits(path, ids)
        print(f"{path}: largest logit {np.abs(want).max():.3g}; largest error", end="")
        for isa in hadamoe.isas():
            hadamoe.set_isa(isa)
            with torch.no_grad():
                print(f"  {isa} {np.abs(model(ids).logits.numpy() - want).max():.2g}", end="")
        print(flush=True)


if __name__ == "__main__":
    main()
