"""config.json, tokenizer and the side files each format's own converter writes."""

from __future__ import annotations

import json
import re

from .shape import Shape
from .tables import super_experts


def special_tokens(shape: Shape) -> dict[str, int]:
    """Ids of the special tokens: the published ones where the vocabulary reaches them."""
    base = 248_044 if shape.vocab > 248_080 else 256
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    ids = {n: base + i for i, n in enumerate(names)}
    vision = (
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    )
    return ids | {n: base + 9 + i for i, n in enumerate(vision)}


def _text_config(shape: Shape) -> dict:
    ids = special_tokens(shape)
    kinds = ("linear_attention", "full_attention")
    rotary = shape.head_dim // 8  # frequencies: a quarter of the head, two dimensions each
    third = rotary // 3
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "bos_token_id": None,
        "dtype": "bfloat16",
        "eos_token_id": ids["<|im_end|>"],
        "full_attention_interval": shape.interval,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "layer_types": [kinds[shape.is_attention(n)] for n in range(shape.layers)],
        "linear_conv_kernel_dim": shape.conv,
        "linear_key_head_dim": shape.key_dim,
        "linear_num_key_heads": shape.key_heads,
        "linear_num_value_heads": shape.value_heads,
        "linear_value_head_dim": shape.value_dim,
        "max_position_embeddings": 262_144,
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": shape.moe,
        "mtp_num_hidden_layers": 1,
        "num_attention_heads": shape.heads,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": None,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [
                rotary - 2 * (third + (rotary % 3 > 1)),
                *[third + (rotary % 3 > 1)] * 2,
            ],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10_000_000,
            "rope_type": "default",
        },
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": shape.moe,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": shape.vocab,
    }


def _vision_config(shape: Shape) -> dict:
    v = shape.vision
    return {
        "depth": v.depth,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": v.hidden,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": v.intermediate,
        "model_type": "qwen3_5_moe_vision",
        "num_heads": v.heads,
        "num_position_embeddings": v.positions,
        "out_hidden_size": shape.hidden,
        "patch_size": v.patch,
        "spatial_merge_size": v.merge,
        "temporal_patch_size": v.temporal,
    }


def base_config(shape: Shape, vision: bool) -> dict:
    """config.json before a format adds its own keys."""
    ids = special_tokens(shape)
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "dtype": "bfloat16",
        "image_token_id": ids["<|image_pad|>"],
        "model_type": "qwen3_5_moe",
        "text_config": _text_config(shape),
        "tie_word_embeddings": False,
        "video_token_id": ids["<|video_pad|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
    }
    if vision:
        config["vision_config"] = _vision_config(shape)
    return config


def mlx_quantization(modules: dict[str, tuple[int, int, str]]) -> dict:
    """The `quantization` dict mlx-lm and mlx-node write: one entry per quantized module."""
    entry = {
        n: dict(zip(("group_size", "bits", "mode"), m, strict=True)) for n, m in modules.items()
    }
    return {"group_size": 64, "bits": 4, "mode": "affine", **entry}


def jang_config(shape: Shape, affine_count: int, tq_count: int, vision: bool) -> dict:
    """jang_config.json of a JANGTQ2 bundle; only `mxtq_seed` matters to a decoder."""
    roles = ("attention", "linear_attention", "shared_expert", "embed_tokens", "lm_head")
    return {
        "version": 2,
        "weight_format": "mxtq",
        "profile": "JANGTQ2",
        "source_model": {"name": "synthetic", "architecture": "qwen3_5_moe_text"},
        "has_vision": vision,
        "mxtq_seed": 42,
        "mxtq_bits": {r: 8 for r in roles} | {"routed_expert": 2},
        "quantization": {
            "method": "affine+mxtq",
            "group_size": 64,
            "bits_default": 8,
            "affine_override_count": affine_count,
            "routed_expert_bits": 2,
            "mxtq_tensor_group_count": tq_count,
        },
        "bundle_has_mtp": False,
        "mtp_layers": 1,
    }


def tq_config(packed: int) -> dict:
    """tq_config.json as the published recipe writes it; its patterns are not what is packed."""
    return {
        "format": "tq3_native",
        "bits": 3,
        "group_size": 128,
        "quantizer_seed": 42,
        "compressed_layers": packed,
        "original_model": "synthetic",
        "sensitive_bits": 4,
        "sensitive_patterns": [
            "o_proj",
            "q_proj",
            "k_proj",
            "v_proj",
            "down_proj",
            "shared_expert",
        ],
    }


def compressed_quantization(shape: Shape, unquantized: list[str]) -> dict:
    """`quantization_config` of W4A16: int8 super-experts and attention, int4 experts."""

    def group(targets: list[str], bits: int, size: int) -> dict:
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group"}
        weights |= {"group_size": size, "dynamic": False, "actorder": None}
        return {
            "targets": targets,
            "weights": weights,
            "format": "pack-quantized",
            "input_activations": None,
            "output_activations": None,
        }

    supers = [
        rf"re:.*layers\.{n}\.mlp\.experts\.{e}\.(gate|up|down)_proj$"
        for n, e in sorted(super_experts(shape))
    ]
    groups = [group(supers, 8, 128)] if supers else []
    groups += [
        group([r"re:.*self_attn\.(q|k|v|o)_proj$"], 8, 128),
        group([r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"], 4, 32),
    ]
    return {
        "config_groups": {f"group_{i}": g for i, g in enumerate(groups)},
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": unquantized,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.15.0",
    }


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def _word(index: int) -> str:
    """A pronounceable stand-in for a vocabulary entry: consonant-vowel pairs, base 80."""
    out = ""
    while index or not out:
        index, digit = divmod(index, 80)
        out += "bcdfghjklmnprstv"[digit % 16] + "aeiou"[digit // 16]
    return "\u0120" + out  # byte-level BPE writes a leading space this way


def tokenizer_files(shape: Shape) -> dict[str, str]:
    """A byte-level tokenizer: text becomes bytes; every other id decodes as a made-up word."""
    ids = special_tokens(shape)
    vocab = {c: i for i, c in enumerate(_byte_alphabet())}
    taken = set(ids.values())
    vocab |= {_word(i - 256): i for i in range(256, shape.vocab) if i not in taken}
    vocab |= ids
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **flags, "special": True} for name, i in ids.items()
        ],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 262_144,
    }
    generation = {"do_sample": False, "eos_token_id": ids["<|im_end|>"]}
    generation["pad_token_id"] = ids["<|endoftext|>"]
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "generation_config.json": json.dumps(generation, indent=2),
    }


def linear_like(name: str) -> bool:
    """Whether compressed-tensors would list an unquantized tensor's module under `ignore`."""
    return name.endswith(".weight") and not re.search(r"norm|conv1d|embed|^mtp\.|patch_embed", name)
