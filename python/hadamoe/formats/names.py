"""From the names files use to one name per thing, and the checks every lookup makes.

A canonical name is ``<module path>.<leaf>``: ``layers.3.self_attn.q_proj.weight``,
``lm_head.scales``, ``layers.0.mlp.experts.5.down_proj.weight_packed``,
``visual.pos_embed.weight``, ``mtp.norm.weight``.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from ..bf16 import from_bf16
from ..checkpoint import Checkpoint, Tensor
from ..errors import FormatError

_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
# Other families' expert names, which JANGTQ's loader knows too: w1 gate, w2 down, w3 up.
_LETTERED = re.compile(r"\.(?:block_sparse_moe|ffn|mlp)\.experts\.(\d+)\.w([123])\.")
_LETTERS = {"1": "gate_proj", "2": "down_proj", "3": "up_proj"}
_FUSED = (".experts.gate_up_proj", ".experts.gate_proj", ".experts.up_proj", ".experts.down_proj")

#: dtypes of plain numbers, and the name the descriptor gives them.
FLOATS = {"BF16": "bf16", "F16": "f16", "F32": "f32"}


def canonical(name: str) -> str:
    """One name per thing, whoever wrote the file."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            name = name[len(prefix) :]
            break
    if name.startswith("vision_tower."):
        return "visual." + name[len("vision_tower.") :]
    if ".switch_mlp." in name:
        name = name.replace(".switch_mlp.", ".experts.")
    elif name.endswith(_FUSED):
        return name + ".weight"
    elif ".w" in name and (m := _LETTERED.search(name)):
        name = f"{name[: m.start()]}.mlp.experts.{m[1]}.{_LETTERS[m[2]]}.{name[m.end() :]}"
    return name.replace(".weight.tq_", ".tq_")


class Files:
    """A checkpoint's tensors by canonical name.

    Attributes:
        checkpoint: where they come from.
        leaves: how many tensors have each (leaf, dtype), e.g. ``("scales", "U8")``.
        scales: every scale and bias taken so far, for `check_finite`.
        notes: remarks worth showing a person.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.scales: list[Tensor] = []
        self.notes: list[str] = list(checkpoint.notes)
        self._stored: dict[str, str] = {}
        self.leaves: Counter[tuple[str, str]] = Counter()
        for name, dtype in checkpoint.dtypes():
            short = canonical(name)
            if short in self._stored:
                raise FormatError(
                    checkpoint.path, name, expected="one tensor of this meaning",
                    found=f"also {self._stored[short]}",
                )  # fmt: skip
            self._stored[short] = name
            self.leaves[short.rpartition(".")[2], dtype] += 1

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def starting(self, prefix: str) -> list[str]:
        """Canonical names that begin with prefix."""
        return [name for name in self._stored if name.startswith(prefix)]

    def claim(self, name: str) -> Tensor:
        """The tensor of a canonical name, claimed; FormatError where there is none."""
        stored = self._stored.get(name)
        if stored is None:
            raise FormatError(self.checkpoint.path, name, expected="a tensor", found="none")
        return self.checkpoint.claim(stored)

    def take(
        self, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...], scale: bool = False
    ) -> Tensor:
        """`claim` and check dtype and shape (None: any size); scale=True lists it in `scales`."""
        t = self.claim(name)
        if t.dtype not in dtypes:
            raise wrong(t, "dtype " + " or ".join(dtypes), t.dtype)
        if t.shape != shape and (
            len(t.shape) != len(shape)
            or any(want is not None and want != n for want, n in zip(shape, t.shape, strict=True))
        ):
            want = ", ".join("any" if n is None else str(n) for n in shape)
            raise wrong(t, f"shape [{want}]", str(list(t.shape)))
        if scale:
            self.scales.append(t)
        return t

    def numbers(self, name: str, *shapes: tuple[int, ...]) -> np.ndarray:
        """A small plain tensor as f32 in its stored shape, one of ``shapes``; finite."""
        t = self.claim(name)
        if t.dtype not in FLOATS:
            raise wrong(t, "dtype " + " or ".join(FLOATS), t.dtype)
        if t.shape not in shapes:
            raise wrong(t, "shape " + " or ".join(str(list(s)) for s in shapes), str(list(t.shape)))
        check_finite([t])
        return as_f32(t)


def wrong(t: Tensor, expected: str, found: str) -> FormatError:
    """A FormatError about this tensor."""
    return FormatError(t.file, t.name, expected=expected, found=found)


def as_f32(t: Tensor) -> np.ndarray:
    """A plain tensor's numbers as a new f32 array."""
    if t.dtype == "BF16":
        return from_bf16(t.array)
    return t.array.astype(np.float32)


#: exponent bits that are all ones in Inf and NaN, per stored dtype; an E8M0 byte of 255 is NaN.
_SPECIAL = {"BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00), "F32": (np.uint32, 0x7F800000)}


def check_finite(tensors: list[Tensor]) -> None:
    """Raise FormatError at the first Inf, NaN or E8M0 255; reads every byte of these tensors."""
    for t in tensors:
        if t.dtype == "U8":
            bad, what = t.array == 255, "E8M0 bytes 0 to 254"
        else:
            kind, mask = _SPECIAL[t.dtype]
            bits = t.array if t.array.dtype == kind else t.array.view(kind)
            bad, what = (bits & mask) == mask, "finite numbers"
        if bad.any():
            at = [int(i) for i in np.unravel_index(int(bad.argmax()), t.shape)]
            value = (
                255
                if t.dtype == "U8"
                else float(as_f32(t._replace(array=t.array[tuple(at)].reshape(()))))
            )
            raise wrong(t, what, f"{value} at {at}")
