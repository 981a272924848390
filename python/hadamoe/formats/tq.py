"""TQ-apex and its kin (turboquant-vllm's ``tq3_native``): 2, 3 or 4 bits, groups of 128.

Stored for a source tensor B with ``rows`` (times experts, flattened) and K columns, G =
ceil(K/128): ``B.tq_packed`` u8 [rows*G, 16*bits], one LSB-first bit stream per group;
``B.tq_norms`` f32 [rows, G]. w = rotate'(codebook[code]) * norm with rotate = signs2 . H128 .
signs1, so x is rotated instead. The width follows from the shape: tq_config.json's patterns are
known to lie.
"""

from __future__ import annotations

from collections.abc import Callable

from ..constants import tq_codebook, tq_signs
from ..errors import FormatError, UnsupportedError
from ..weight import Instance, Rotation, Weight
from .grid import flat_rows, grid
from .names import Files, wrong

GROUP = 128
#: bytes of one group -> bits of a code
_BITS = {32: 2, 48: 3, 64: 4}


def detect(files: Files) -> tuple[str, list[str]] | None:
    """(name, evidence) if this is a TQ checkpoint."""
    packed = files.leaves["tq_packed", "U8"]
    config = files.checkpoint.json("tq_config.json")
    if config is None and not packed:
        return None
    evidence = [f"{packed} tensors *.tq_packed of U8 (TQ)"]
    if config is not None:
        path = files.checkpoint.path / "tq_config.json"
        if config.get("format") != "tq3_native":
            raise FormatError(
                path, "format", expected="'tq3_native'", found=repr(config.get("format"))
            )
        group = config.get("group_size", GROUP)
        if group != GROUP:
            raise UnsupportedError(f"{path}: group_size {group!r}; hadamoe reads {GROUP}")
        evidence.append("tq_config.json: format tq3_native")
    return "tq", evidence


def reader(files: Files) -> Callable[[str, int, int, int | None], Weight | None]:
    """A function from module path and size to its weight, or None if it is not quantised."""
    config = files.checkpoint.json("tq_config.json") or {}
    seed = config.get("quantizer_seed", 42)
    if type(seed) is not int or not 0 <= seed < 1 << 32:
        path = files.checkpoint.path / "tq_config.json"
        raise FormatError(
            path, "quantizer_seed", expected="an integer 0 to 2^32-1", found=repr(seed)
        )
    pre, post = tq_signs(GROUP, seed)
    rotation = Rotation(GROUP, pre, post)

    def read(path: str, rows: int, columns: int, experts: int | None) -> Weight | None:
        if f"{path}.tq_packed" not in files:
            return None
        count, groups = (experts or 1) * rows, -(-columns // GROUP)
        packed = files.take(f"{path}.tq_packed", ("U8",), (count * groups, None))
        bits = _BITS.get(packed.shape[1])
        if bits is None:
            raise wrong(
                packed, "32, 48 or 64 bytes in a group (2, 3 or 4 bits)", str(packed.shape[1])
            )
        norms = files.take(f"{path}.tq_norms", ("F32",), (count, groups), scale=True)
        return grid(
            Instance("codebook", bits, "f32"), groups * GROUP, GROUP, experts,
            packed.bytes_2d(count), flat_rows(norms, count), None, tq_codebook(bits), rotation,
            columns,
        )  # fmt: skip

    return read
