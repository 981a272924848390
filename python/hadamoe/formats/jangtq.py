"""JANGTQ ("mxtq"): routed experts as Lloyd-Max codes, one norm per row; the rest MLX affine.

Stored for experts' projection P with d columns: ``P.tq_packed`` u32 [E, rows, d*bits/32] (2 or 4
bits, LSB first), ``P.tq_norms`` f16 [E, rows], ``P.tq_bits`` (one integer, may be absent). w =
rotate'(norm * codebook[code]) with rotate = H . signs, H in d's powers of two, largest first.
Signs and codebooks come from the sidecar ``jangtq_runtime.safetensors`` where it has them, else
they are recomputed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..checkpoint import Shard, Tensor
from ..constants import jangtq_codebook, jangtq_signs
from ..errors import FormatError, UnsupportedError
from ..weight import Instance, Rotation, Weight
from .grid import flat_rows, grid, lead
from .mlx import reader as mlx_reader
from .names import Files, wrong

SIDECAR = "jangtq_runtime.safetensors"
BITS = (2, 4)


def detect(files: Files) -> tuple[str, list[str]] | None:
    """(name, evidence) if this is a JANGTQ checkpoint."""
    root, config = files.checkpoint.path, files.checkpoint.config
    if any(leaf in ("tq2_packed", "tq2_scales") for leaf, _ in files.leaves):
        raise UnsupportedError(f"{root}: jang's v2 layout (tq2_packed) is not supported; mxtq is")
    packed = files.leaves["tq_packed", "U32"]
    jang = files.checkpoint.json("jang_config.json") or {}
    said = {"config.json": config, "jang_config.json": jang}
    evidence = [
        f"{name}: weight_format mxtq"
        for name, d in said.items()
        if d.get("weight_format") == "mxtq"
    ]
    if (
        not packed
    ):  # jang's converter writes plain MLX affine, under this name, from per-expert sources
        return None
    if isinstance(jang.get("profile"), str):
        evidence.append(f"jang_config.json: profile {jang['profile']}")
    return "jangtq", [f"{packed} tensors *.tq_packed of U32 (JANGTQ)", *evidence]


def reader(files: Files) -> Callable[[str, int, int, int | None], Weight | None]:
    """A function from module path and size to its weight, or None if it is not quantised."""
    affine = mlx_reader(files)
    tables = _Tables(files)

    def read(path: str, rows: int, columns: int, experts: int | None) -> Weight | None:
        if f"{path}.tq_packed" not in files:
            return affine(path, rows, columns, experts)
        head, count = lead(experts), (experts or 1) * rows
        packed = files.take(f"{path}.tq_packed", ("U32",), (*head, rows, None))
        bits = _bits(files, path, packed, columns)
        norms = files.take(f"{path}.tq_norms", ("F16",), (*head, rows), scale=True)
        return grid(
            Instance("codebook", bits, "f16"), columns, columns, experts, packed.bytes_2d(count),
            flat_rows(norms, count), None, tables.codebook(columns, bits), tables.rotation(columns),
        )  # fmt: skip

    return read


def _bits(files: Files, path: str, packed: Tensor, columns: int) -> int:
    """tq_bits where stored, checked against the row width; else from the row width."""
    words = packed.shape[-1]
    need = {bits: -(-columns // (32 // bits)) for bits in BITS}  # whole words: no code spans two
    name = f"{path}.tq_bits"
    if name not in files:
        fit = [bits for bits in BITS if need[bits] == words]
        if len(fit) != 1:
            wanted = " or ".join(map(str, need.values()))
            raise wrong(packed, f"{wanted} words in a row of {columns} columns", str(words))
        return fit[0]
    t = files.claim(name)
    if t.array.dtype.kind not in "iu" or t.array.size < 1:
        raise wrong(t, "one integer", f"{t.dtype} {list(t.shape)}")
    bits = int(t.array.flat[0])
    if bits == 3:
        raise UnsupportedError(
            f"{packed.file}: {packed.name}: JANGTQ's 3-bit layout is not supported; "
            "its own converter cannot produce it"
        )
    if bits not in BITS:
        raise wrong(t, f"bits in {BITS}", str(bits))
    if words != need[bits]:
        expected = f"{need[bits]} words in a row of {columns} columns, {bits} bits"
        raise wrong(packed, expected, str(words))
    return bits


class _Tables:
    """Signs and codebooks: the sidecar's where it has them in the right shape, else recomputed."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._seed = _seed(files)
        self._stored: dict[str, np.ndarray] = {}
        self._rotations: dict[int, Rotation] = {}
        self._codebooks: dict[tuple[int, int], np.ndarray] = {}
        path = files.checkpoint.path / SIDECAR
        if path.exists():
            shard = Shard(path)
            for name, (dtype, shape, begin) in shard.entries.items():
                if (
                    dtype != "F32"
                    or len(shape) != 1
                    or not name.startswith(("signs.", "codebook."))
                ):
                    raise FormatError(
                        path, name, expected="signs.* or codebook.* of F32, one dimension",
                        found=f"{dtype} {list(shape)}",
                    )  # fmt: skip
                # a copy: the sidecar is small, may be unaligned, and its mapping can go
                self._stored[name] = np.array(np.ndarray(shape, "<f4", shard.data, begin))
                if not np.isfinite(self._stored[name]).all():
                    raise FormatError(path, name, expected="finite numbers", found="Inf or NaN")

    def rotation(self, columns: int) -> Rotation:
        if columns not in self._rotations:
            signs = self._pick(f"signs.{columns}.{self._seed}", jangtq_signs(columns, self._seed))
            if not np.isin(signs, (-1, 1)).all():
                path = self._files.checkpoint.path / SIDECAR
                name = f"signs.{columns}.{self._seed}"
                raise FormatError(path, name, expected="signs of +1 and -1", found="another number")
            self._rotations[columns] = Rotation(None, signs)
        return self._rotations[columns]

    def codebook(self, columns: int, bits: int) -> np.ndarray:
        key = (columns, bits)
        if key not in self._codebooks:
            name = f"codebook.{columns}.{bits}"
            self._codebooks[key] = self._pick(name, jangtq_codebook(columns, bits))
        return self._codebooks[key]

    def _pick(self, name: str, computed: np.ndarray) -> np.ndarray:
        stored = self._stored.get(name)
        if stored is None:
            return computed
        if stored.shape != computed.shape:
            self._files.notes.append(
                f"{SIDECAR}: {name} has {stored.size} numbers, needs {computed.size}: recomputed"
            )
            return computed
        if not np.array_equal(stored, computed):
            self._files.notes.append(
                f"{SIDECAR}: {name} differs from the recomputed one; the file's is used"
            )
        return stored


def _seed(files: Files) -> int:
    root = files.checkpoint.path
    for name, config in (
        ("jang_config.json", files.checkpoint.json("jang_config.json") or {}),
        ("config.json", files.checkpoint.config),
    ):
        seed = config.get("mxtq_seed")
        if seed is not None:
            if type(seed) is not int or not 0 <= seed < 1 << 64:
                raise FormatError(
                    root / name, "mxtq_seed", expected="an integer 0 to 2^64-1", found=repr(seed)
                )
            return seed
    return 42
