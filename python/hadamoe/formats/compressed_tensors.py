"""compressed-tensors ``pack-quantized``: int codes in 32-bit words, group or channel scales.

Stored for a module P [N, K]: ``P.weight_packed`` i32 [N, ceil(K*bits/32)], one LSB-first bit
stream per row of codes q + 2^(bits-1); ``P.weight_scale`` [N, K/group], [N, 1] or [1];
``P.weight_shape`` i64 (N, K);
asymmetric: ``P.weight_zero_point`` i32 [ceil(N*bits/32), K/group], packed along N. w = scale *
    (code - zero). Experts may each have their own width. Bits and group follow from the shapes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..checkpoint import Tensor
from ..errors import UnsupportedError
from ..weight import Instance, Weight
from .grid import flat_rows, grid
from .names import FLOATS, Files, as_f32, wrong

_REFUSED = {
    "weight_global_scale": "NVFP4", "input_global_scale": "NVFP4",
    "gate_up_proj_scale": "fused experts' scales (repack_moe)",
    "down_proj_scale": "fused experts' scales (repack_moe)",
    "gate_up_proj_zero_point": "fused experts' zero points (repack_moe)",
    "down_proj_zero_point": "fused experts' zero points (repack_moe)",
}  # fmt: skip


def detect(files: Files) -> tuple[str, list[str]] | None:
    """(name, evidence) if this is a compressed-tensors checkpoint."""
    root = files.checkpoint.path
    packed = {d: n for (leaf, d), n in files.leaves.items() if leaf == "weight_packed"}
    config = files.checkpoint.config.get("quantization_config")
    method = config.get("quant_method") if isinstance(config, dict) else None
    if not packed and method != "compressed-tensors":
        return None
    for leaf, dtype in files.leaves:
        if leaf in _REFUSED:
            raise UnsupportedError(
                f"{root}: compressed-tensors {_REFUSED[leaf]} (tensors *.{leaf})"
            )
        if leaf == "weight" and dtype in ("I8", "F8_E4M3", "F8_E5M2"):
            raise UnsupportedError(
                f"{root}: compressed-tensors with {dtype} weights; hadamoe reads pack-quantized"
            )
    if "U8" in packed:
        raise UnsupportedError(
            f"{root}: compressed-tensors mxfp4-pack-quantized; hadamoe reads pack-quantized"
        )
    evidence = [f"{n} tensors *.weight_packed of {d}" for d, n in packed.items()]
    if isinstance(config, dict):
        kind = config.get("format")
        if kind not in ("pack-quantized", "mixed-precision", None):
            raise UnsupportedError(
                f"{root}: compressed-tensors {kind}; hadamoe reads pack-quantized"
            )
        evidence.append(f"config.json: quant_method {method}, format {kind}")
    return "compressed-tensors", evidence


def reader(files: Files) -> Callable[[str, int, int, int | None], Weight | None]:
    """A function from module path and size to its weight, or None if it is not quantised."""
    symmetric = _all_symmetric(files.checkpoint.config)

    def read(path: str, rows: int, columns: int, experts: int | None) -> Weight | None:
        if experts is not None or f"{path}.weight_packed" not in files:
            return None
        return _packed(files, path, rows, columns, symmetric)

    return read


def _packed(files: Files, path: str, rows: int, columns: int, symmetric: bool) -> Weight:
    codes = files.take(f"{path}.weight_packed", ("I32",), (rows, None))
    bits = 32 * codes.shape[1] // columns
    if not 2 <= bits <= 8 or codes.shape[1] != -(-columns * bits // 32):
        raise wrong(
            codes, f"ceil({columns} * bits / 32) words in a row, bits 2 to 8", str(codes.shape[1])
        )
    shape = files.take(f"{path}.weight_shape", ("I64", "I32"), (2,))
    if shape.array.tolist() != [rows, columns]:
        raise wrong(shape, f"{[rows, columns]}", str(shape.array.tolist()))
    scale = files.claim(f"{path}.weight_scale")
    files.scales.append(scale)
    if scale.dtype not in FLOATS:
        raise wrong(scale, "dtype " + " or ".join(FLOATS), scale.dtype)
    group, values = _scales(scale, rows, columns)
    if f"{path}.weight_g_idx" in files:
        _natural_order(files, path, columns, group)
    zero = _zero_point(files, path, rows, columns // group, bits)
    if zero is None or (zero == 1 << (bits - 1)).all():
        instance = Instance("linear_signed", bits, FLOATS[scale.dtype])
        return grid(instance, columns, group, None, codes.bytes_2d(rows), values)
    if symmetric:
        name = f"{path}.weight_zero_point"
        raise wrong(files.claim(name), "zero points of 0 (the config is symmetric)", "others")
    if scale.dtype == "F16":
        values = values.view(np.float16)
    wide = as_f32(scale._replace(array=values))
    return grid(
        Instance("linear", bits, "f32"), columns, group, None, codes.bytes_2d(rows), wide,
        -zero.astype(np.float32) * wide,
    )  # fmt: skip


def _scales(scale: Tensor, rows: int, columns: int) -> tuple[int, np.ndarray]:
    """(group, scales [rows, groups]); a single scale is repeated for each row."""
    if scale.shape in ((1,), ()):
        return columns, np.repeat(flat_rows(scale, 1), rows, axis=0)
    if len(scale.shape) != 2 or scale.shape[0] != rows or not scale.shape[1]:
        raise wrong(scale, f"shape [{rows}, groups] or [1]", str(list(scale.shape)))
    groups = scale.shape[1]
    if columns % groups:
        raise wrong(scale, f"a divisor of {columns} columns as groups", str(groups))
    return columns // groups, flat_rows(scale, rows)


def _natural_order(files: Files, path: str, columns: int, group: int) -> None:
    t = files.take(f"{path}.weight_g_idx", ("I32", "I64"), (columns,))
    order = np.arange(columns) // group
    if not ((t.array == order) | (t.array == -1)).all():
        raise UnsupportedError(
            f"{t.file}: {t.name}: columns in another order than k // {group} (actorder=group)"
        )


def _zero_point(files: Files, path: str, rows: int, groups: int, bits: int) -> np.ndarray | None:
    """Unsigned zero points u8 [rows, groups], unpacked from the bit stream along rows."""
    if f"{path}.weight_zero_point" not in files:
        return None
    t = files.take(f"{path}.weight_zero_point", ("I32",), (-(-rows * bits // 32), groups))
    stream = np.ascontiguousarray(t.array.T).view(np.uint8)
    flags = np.unpackbits(stream, axis=1, bitorder="little")[:, : rows * bits]
    weights = (1 << np.arange(bits)).astype(np.uint8)
    codes = (flags.reshape(groups, rows, bits) * weights).sum(-1, dtype=np.uint8)
    return np.ascontiguousarray(codes.T)


def _all_symmetric(config: dict) -> bool:
    """Whether the config has groups of weights and says every one is symmetric."""
    quantization = config.get("quantization_config")
    groups = quantization.get("config_groups") if isinstance(quantization, dict) else None
    if not isinstance(groups, dict) or not groups:
        return False
    said = [g.get("weights") if isinstance(g, dict) else None for g in groups.values()]
    return all(isinstance(w, dict) and w.get("symmetric") is True for w in said)
