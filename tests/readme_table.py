"""README's support table, generated from the list of compiled instances.

python tests/readme_table.py
"""

from __future__ import annotations

from itertools import groupby

from hadamoe.packed import instances

#: What arrives in each table kind.
ARRIVES = {
    "linear": "MLX affine: Config-I, JANGTQ and MXFP4 companions; compressed-tensors asymmetric",
    "linear_signed": "compressed-tensors symmetric (W4A16), groups or channels",
    "e2m1": "MXFP4 of MLX, compressed-tensors and gpt-oss",
    "e2m1_gguf": "MXFP4 blocks of GGUF",
    "codebook": "JANGTQ (f16 scale per row), TQ (f32 scale per 128)",
    "plain": "weights kept in bf16, f16 or f32",
}


def table() -> str:
    """The table in Markdown: a row per table kind, its code widths and scale dtypes."""
    lines = ["| table | bits | scale | arrives from |", "|---|---|---|---|"]
    for kind, group in groupby(instances(), key=lambda i: i.table):
        found = list(group)
        if kind == "plain":
            bits, scales = ", ".join(f"{i.scale}" for i in found), ""
        else:
            pairs: dict[tuple[int, ...], list[str]] = {}
            for scale in dict.fromkeys(i.scale for i in found):
                widths = tuple(i.bits for i in found if i.scale == scale)
                pairs.setdefault(widths, []).append(scale)
            bits = "; ".join(", ".join(map(str, widths)) for widths in pairs)
            scales = "; ".join(", ".join(names) for names in pairs.values())
        lines.append(f"| `{kind}` | {bits} | {scales} | {ARRIVES[kind]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
