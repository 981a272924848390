"""A layer's matrices and vectors under the names of their roles in the ops."""

from __future__ import annotations

import numpy as np

from ..weight import Weight, fuse_rows
from .assemble import ModelFiles

Arrays = dict[str, np.ndarray]


def norms(files: ModelFiles, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """f32 [hidden] of the norms before a layer's first and second half, as they are used."""
    at = f"layers.{layer}."
    first, second = (
        files.tensors[f"{at}{name}_layernorm"].astype(np.float32)
        for name in ("input", "post_attention")
    )
    return first, second


def attention(files: ModelFiles, layer: int) -> tuple[dict[str, Weight], Arrays]:
    """Weights q, k, v, o; f32 q_norm and k_norm, as they are used."""
    at = f"layers.{layer}.self_attn."
    weights = {name: files.weights[f"{at}{name}_proj"] for name in "qkvo"}
    return weights, {name: files.tensors[at + name] for name in ("q_norm", "k_norm")}


def delta_net(files: ModelFiles, layer: int) -> tuple[dict[str, Weight], Arrays]:
    """Weights qkv, z, b, a, out; f32 conv_weight, a_log, dt_bias, norm, in the ops' order."""
    at = f"layers.{layer}.linear_attn."
    names = {"conv_weight": "conv1d", "a_log": "A_log", "dt_bias": "dt_bias", "norm": "norm"}
    weights = {n: files.weights[f"{at}in_proj_{n}"] for n in ("qkv", "z", "b", "a")}
    weights["out"] = files.weights[at + "out_proj"]
    return weights, {name: files.tensors[at + stored] for name, stored in names.items()}


def moe(files: ModelFiles, layer: int) -> dict[str, Weight]:
    """The six matrices of a mixture of experts; gate rows before up rows."""
    w, at = files.weights, f"layers.{layer}.mlp."
    shared = [w[f"{at}shared_expert.{name}_proj"] for name in ("gate", "up")]
    return {
        "router": w[at + "gate"],
        "gate_up": w[at + "experts.gate_up"],
        "down": w[at + "experts.down"],
        "shared_gate_up": fuse_rows(shared),
        "shared_down": w[at + "shared_expert.down_proj"],
        "shared_gate": w[at + "shared_expert_gate"],
    }
