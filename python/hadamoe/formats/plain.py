"""Checkpoints stored as numbers (bf16, f16, f32): the hub's layout, or MLX's unquantised one."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import UnsupportedError
from ..weight import Weight
from .names import FLOATS, Files

#: leaves of quantised layouts nobody here reads -> their name
_REFUSED = {
    "weight_scale_inv": "block-wise FP8", "input_scale": "quantised activations",
    "qweight": "GPTQ or AWQ", "absmax": "bitsandbytes",
}  # fmt: skip


def detect(files: Files) -> tuple[str, list[str]] | None:
    """(name, evidence): what is left when no quantised layout is found."""
    for leaf, _ in files.leaves:
        if leaf in _REFUSED:
            raise UnsupportedError(f"{files.checkpoint.path}: {_REFUSED[leaf]} (tensors *.{leaf})")
    said = files.checkpoint.config.get("quantization_config")
    if isinstance(said, dict) and said.get("quant_method"):
        raise UnsupportedError(
            f"{files.checkpoint.path}: quant_method {said['quant_method']!r} is not supported"
        )
    counts: dict[str, int] = {}
    for (_, dtype), n in files.leaves.items():
        if dtype in FLOATS:
            counts[dtype] = counts.get(dtype, 0) + n
    common = max(counts, key=counts.__getitem__, default="BF16")
    evidence = [f"no quantised tensors; {n} tensors of {d}" for d, n in sorted(counts.items())]
    return FLOATS[common], evidence


def reader(files: Files) -> Callable[[str, int, int, int | None], Weight | None]:
    """Nothing is quantised."""
    return lambda path, rows, columns, experts: None
