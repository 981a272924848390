"""MLX directories: affine 2 to 8 bits (Config-I and any other mix) and MXFP4, per module.

Stored for a module P, columns K: ``P.weight`` u32 [.., rows, K*bits/32], one LSB-first bit stream
per row; ``P.scales`` [.., rows, K/group]; ``P.biases`` alike, affine only (w = scale * code +
bias). MXFP4 has u8 E8M0 scales, group 32, no biases. Bits and group follow from the shapes: the
config's entries are only compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import UnsupportedError
from ..weight import Instance, Weight
from .grid import flat_rows, grid, lead
from .names import FLOATS, Files, canonical, wrong

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
_BLOCK_MODES = {(8, 32): "MXFP8", (4, 16): "NVFP4"}


def detect(files: Files) -> tuple[str, list[str]] | None:
    """(name, evidence) if this is an MLX directory."""
    kinds = {dtype: n for (leaf, dtype), n in files.leaves.items() if leaf == "scales"}
    if not kinds:
        return None
    blocks = kinds.pop("U8", 0)
    evidence = []
    if blocks:
        evidence.append(f"{blocks} tensors *.scales of E8M0 bytes (MXFP4)")
    for dtype, count in sorted(kinds.items()):
        evidence.append(f"{count} tensors *.scales of {dtype} (affine)")
    quantization = files.checkpoint.config.get("quantization")
    if isinstance(quantization, dict):
        said = {k: v for k, v in quantization.items() if not isinstance(v, (dict, bool))}
        evidence.append(f"config.json: quantization {said}")
    return "mxfp4" if blocks else "mlx-affine", evidence


def reader(files: Files) -> Callable[[str, int, int, int | None], Weight | None]:
    """A function from module path and size to its weight, or None if it is not quantised."""
    said = _entries(files.checkpoint.config)

    def read(path: str, rows: int, columns: int, experts: int | None) -> Weight | None:
        if f"{path}.scales" not in files:
            return None
        weight = affine(files, path, rows, columns, experts)
        part = weight.parts[0][0]
        entry = said.get(path)
        if isinstance(entry, dict):
            want = (entry.get("bits", part.instance.bits), entry.get("group_size", part.group))
            found = (part.instance.bits, part.group)
            if want != found:
                files.notes.append(
                    f"{path}: config.json says bits, group {want}; the tensors hold {found}"
                )
        elif entry is False:
            files.notes.append(f"{path}: config.json says not quantised; the tensors are")
        return weight

    return read


def affine(files: Files, path: str, rows: int, columns: int, experts: int | None) -> Weight:
    """One MLX-quantised module; bits and group from the shapes."""
    head = lead(experts)
    codes = files.take(f"{path}.weight", ("U32",), (*head, rows, None))
    scales = files.take(f"{path}.scales", (*FLOATS, "U8"), (*head, rows, None), scale=True)
    words, groups = codes.shape[-1], scales.shape[-1]
    bits, rest = divmod(words * 32, columns)
    if rest or not 1 <= bits <= 8:
        need = ", ".join(str(columns * b // 32) for b in BITS)
        raise wrong(codes, f"{need} words in a row of {columns} columns", str(words))
    if not groups or columns % groups:
        raise wrong(scales, f"a divisor of {columns} columns as groups", str(groups))
    group, count = columns // groups, (experts or 1) * rows
    if scales.dtype == "U8":
        if (bits, group) in _BLOCK_MODES:
            mode = _BLOCK_MODES[bits, group]
            raise UnsupportedError(
                f"{scales.file}: {scales.name}: {mode} is not supported; MXFP4 is"
            )
        if (bits, group) != (4, 32) or f"{path}.biases" in files:
            raise wrong(scales, "MXFP4: 4 bits, group 32, no biases", f"{bits} bits, group {group}")
        instance = Instance("e2m1", 4, "e8m0")
        return grid(instance, columns, 32, experts, codes.bytes_2d(count), flat_rows(scales, count))
    if bits not in BITS:
        raise wrong(codes, f"bits in {BITS}", f"{bits} ({words} words for {columns} columns)")
    if group not in GROUPS:
        raise wrong(scales, f"a group in {GROUPS}", f"{group} ({groups} groups)")
    biases = files.take(f"{path}.biases", (scales.dtype,), scales.shape, scale=True)
    return grid(
        Instance("linear", bits, FLOATS[scales.dtype]), columns, group, experts,
        codes.bytes_2d(count), flat_rows(scales, count), flat_rows(biases, count),
    )  # fmt: skip


def _entries(config: dict[str, Any]) -> dict[str, Any]:
    quantization = config.get("quantization") or config.get("quantization_config")
    if not isinstance(quantization, dict):
        return {}
    return {canonical(k + ".").rstrip("."): v for k, v in quantization.items() if "." in k}
