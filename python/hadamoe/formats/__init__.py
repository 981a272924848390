"""From a checkpoint directory to weight descriptors, whatever its format.

    from hadamoe import formats
    model = formats.read("Qwen3.6-35B-A3B-JANGTQ2")  # ModelFiles; maps files, reads no weights
    model.format, model.evidence                 # "jangtq", ["120 tensors *.tq_packed of U32 ..."]
    model.config                                 # dict for Qwen3_5MoeConfig(**config)
    model.weights["layers.3.self_attn.q_proj"]   # Weight, views of the mapped files
    model.tensors["layers.0.input_layernorm"]    # f32, multiplies as it is (1 + w already)

``weights`` (paths without any prefix; L a layer):
    embed_tokens, lm_head (the same object when tied),
    layers.L.self_attn.{q,k,v,o}_proj                   q_proj: per head, query rows then gate rows
    layers.L.linear_attn.{in_proj_qkv,in_proj_z,in_proj_b,in_proj_a,out_proj}
    layers.L.mlp.gate (router), layers.L.mlp.shared_expert_gate,
    layers.L.mlp.shared_expert.{gate_proj,up_proj,down_proj},
    layers.L.mlp.experts.gate_up    E experts of 2*I rows, gate rows then up rows (one part or two),
    layers.L.mlp.experts.down       E experts; each expert may have its own width,
    visual.<module>                 only the vision tower's quantised linears.
``tensors`` (f32 copies): norm, layers.L.{input_layernorm,post_attention_layernorm},
    layers.L.self_attn.{q_norm,k_norm}, layers.L.linear_attn.{norm,conv1d,A_log,dt_bias}.
    Norms are the factor gamma itself: HF's zero-centred modules want gamma - 1, except
    linear_attn.norm.
``vision``: ``Stored(dtype, array)`` by HF name, ``visual.*``; bias of a quantised linear included.

Views may be unaligned: MLX writes headers of any length. Raises FormatError for files that are not
what they claim, UnsupportedError for layouts read by nobody here; scales are checked for NaN at
once where they are few (32 MB), else by ``model.verify()``.
"""

from __future__ import annotations

from os import PathLike

from ..checkpoint import Checkpoint
from . import compressed_tensors, jangtq, mlx, plain, tq
from .assemble import ModelFiles, Stored, assemble
from .config import Geometry, Vision, geometry, normalise, with_rope
from .names import Files

#: Asked in this order; each module has ``detect(files)`` and ``reader(files)``.
READERS = (tq, jangtq, compressed_tensors, mlx, plain)
#: Scales of at most this many bytes are checked while reading.
VERIFY_AT_ONCE = 32 << 20

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

__all__ = [
    "READERS", "Geometry", "ModelFiles", "Stored", "Vision", "detect", "read", "with_rope",
]  # fmt: skip


def detect(path: str | PathLike[str]) -> tuple[str, list[str]]:
    """(format name, evidence) of a directory; raises as `read` does for unreadable headers."""
    with Checkpoint.open(path) as checkpoint:
        _, name, evidence = _detect(Files(checkpoint))
    return name, evidence


def read(path: str | PathLike[str]) -> ModelFiles:
    """Open a checkpoint directory and describe every tensor in it.

    Raises: FormatError naming file, tensor, expected and found; UnsupportedError naming the layout.
    """
    checkpoint = Checkpoint.open(path)
    where = checkpoint.path / "config.json"
    config = normalise(checkpoint.config, where)
    files = Files(checkpoint)
    module, name, evidence = _detect(files)
    model = ModelFiles(
        name, evidence, config, geometry(config, where), checkpoint, files.notes, _files=files
    )
    model.tokenizer = any((checkpoint.path / f).exists() for f in _TOKENIZER)
    assemble(model, files, module.reader(files), shifted=module is mlx)
    if model.scale_bytes() <= VERIFY_AT_ONCE:
        model.verify()
    return model


def _detect(files: Files):
    for module in READERS:
        found = module.detect(files)
        if found is not None:
            return (module, *found)
    raise AssertionError("plain.detect always answers")
