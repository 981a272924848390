"""A synthetic checkpoint: which tensors in which file, and the writer."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..constants import jangtq_codebook, jangtq_signs
from ..errors import ContractError
from . import configs, tables
from .fill import ITEM_BYTES, Fill, Source, Tensor
from .shape import Matrix, Shape, Vector, mtp_head, text_model


@dataclass(frozen=True, slots=True)
class _Format:
    table: Callable[[Matrix | Vector, Shape], Iterator[Tensor]]
    vision: tuple[str, str, bool]  # prefix, dtype, MLX layout
    shard: int  # bytes at which the converter starts another file
    mtp: bool = False
    by_name: bool = False  # MLX writes tensors in the order of their names, safetensors by width
    metadata: str | None = None


_GIB = 1 << 30
FORMATS: dict[str, _Format] = {
    "config-i": _Format(
        tables.config_i, ("vision_tower", "BF16", True), 5 * _GIB, by_name=True, metadata="mlx"
    ),
    "tq-apex2": _Format(tables.tq_apex2, ("model.visual", "F16", False), 5 * _GIB, mtp=True),
    "jangtq2": _Format(tables.jangtq2, ("vision_tower", "F16", True), 10**9),
    "mxfp4": _Format(
        tables.mxfp4_node, ("vision_tower", "BF16", True), 5 * 10**9, by_name=True, metadata="mlx"
    ),
    "w4a16": _Format(
        tables.w4a16, ("model.visual", "BF16", False), 5 * 10**9, mtp=True, metadata="pt"
    ),
}


def plan(
    format: str,
    shape: Shape | None = None,
    *,
    vision: bool = False,
    mtp: bool = True,
    seed: int = 0,
) -> Plan:
    """What a synthetic checkpoint will hold; nothing is written before `Plan.write`.

    Args:
        format: a key of `FORMATS`.
        shape: dimensions; None for Qwen3.6-35B-A3B.
        vision: add the vision tower (Config-I's own file has none; the others' do).
        mtp: add the multi-token prediction head where the format keeps it (TQ, W4A16).
        seed: same seed, same bytes.

    Raises:
        ContractError: unknown format.
    """
    if format not in FORMATS:
        raise ContractError(f"synth: format={format!r}, needs one of {', '.join(FORMATS)}")
    kind, shape = FORMATS[format], shape or Shape()
    tensors = [t for p in text_model(shape) for t in kind.table(p, shape)]
    if vision:
        prefix, dtype, mlx = kind.vision
        tensors += tables.vision(shape, prefix, dtype, mlx=mlx, packed=format == "tq-apex2")
    head = [t for p in mtp_head(shape) for t in kind.table(p, shape)] if mtp and kind.mtp else []
    return Plan(format, shape, tuple(tensors), tuple(head), vision, seed)


@dataclass(frozen=True, slots=True)
class Plan:
    """A synthetic checkpoint before it is written.

    Attributes:
        tensors: everything but the MTP head. mtp: the head.
    """

    format: str
    shape: Shape
    tensors: tuple[Tensor, ...]
    mtp: tuple[Tensor, ...]
    vision: bool
    seed: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors (headers, tokenizer and configs add about 10 MB)."""
        return sum(t.nbytes for t in (*self.tensors, *self.mtp))

    def shards(self) -> dict[str, list[Tensor]]:
        """File name -> tensors in file order, split as the format's own converter splits."""
        kind = FORMATS[self.format]
        # W4A16 adds the head as a file of its own; turboquant-vllm runs it through with the rest
        apart = self.format == "w4a16"
        tensors = list(self.tensors) if apart else [*self.tensors, *self.mtp]
        if kind.by_name:
            tensors.sort(key=lambda t: t.name)
        groups: list[list[Tensor]] = [[]]
        size = 0
        for t in tensors:
            # jang starts a file once the limit is passed, the others before they would pass it
            ahead = 0 if self.format == "jangtq2" else t.nbytes
            if groups[-1] and size + ahead > kind.shard:
                groups.append([])
                size = 0
            groups[-1].append(t)
            size += t.nbytes
        if not kind.by_name:
            for g in groups:
                g.sort(key=lambda t: (-ITEM_BYTES[t.dtype], t.dtype, t.name))
        single = len(groups) == 1 and self.format != "jangtq2"
        names = (
            ["model.safetensors"]
            if single
            else [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
        )
        shards = dict(zip(names, groups, strict=True))
        if apart and self.mtp:
            shards["model_mtp.safetensors"] = list(self.mtp)
        return shards

    def files(self) -> dict[str, str]:
        """Text of every file beside the weights."""
        config = configs.base_config(self.shape, self.vision)
        out: dict[str, dict] = {}
        if self.format in ("config-i", "mxfp4"):
            config["quantization"] = configs.mlx_quantization(self._mlx_modules())
            config["quantization_config"] = config["quantization"]
        elif self.format == "jangtq2":
            modules = dict(sorted(self._mlx_modules().items()))
            config["quantization"] = configs.mlx_quantization(modules) | {"bits": 8}
            config |= {"weight_format": "mxtq", "mxtq_seed": 42, "mxtq_bits": 2}
            packed = sum(t.name.endswith(".tq_packed") for t in self.tensors)
            out["jang_config.json"] = configs.jang_config(
                self.shape, len(modules), packed, self.vision
            )
        elif self.format == "tq-apex2":
            packed = sum(t.name.endswith(".tq_packed") for t in (*self.tensors, *self.mtp))
            out["tq_config.json"] = configs.tq_config(packed)
        else:
            dense = [
                t.name.removesuffix(".weight") for t in self.tensors if configs.linear_like(t.name)
            ]
            config["quantization_config"] = configs.compressed_quantization(
                self.shape, [*dense, "re:^mtp.*"]
            )
        out["config.json"] = config
        return {n: json.dumps(c, indent=2) for n, c in out.items()} | configs.tokenizer_files(
            self.shape
        )

    def _mlx_modules(self) -> dict[str, tuple[int, int, str]]:
        """Quantized module -> (group, bits, mode), read off the planned shapes."""
        words = {t.module: t.shape[-1] for t in self.tensors if t.dtype == "U32"}
        found = {}
        for t in self.tensors:
            if t.name.endswith(".scales"):
                group, mode = (32, "mxfp4") if t.dtype == "U8" else (64, "affine")
                found[t.module] = (group, 32 * words[t.module] // (t.shape[-1] * group), mode)
        return found

    def write(
        self, out: str | os.PathLike[str], progress: Callable[[int], None] | None = None
    ) -> Path:
        """Write the checkpoint into a new directory, streaming.

        Everything goes to a temporary directory beside ``out`` first and is renamed at the end: an
        interrupted run leaves no half checkpoint under the final name.

        Args:
            out: directory to create; must not exist.
            progress: called with the number of bytes written since the last call.

        Raises:
            ContractError: ``out`` exists.
            OSError: not enough free space, or the disk failed.
        """
        out = Path(out).absolute()
        if out.exists():
            raise ContractError(f"synth: {out} exists, will not overwrite it")
        out.parent.mkdir(parents=True, exist_ok=True)
        need, free = self.nbytes + (64 << 20), shutil.disk_usage(out.parent).free
        if need > free:
            raise OSError(
                errno.ENOSPC,
                f"synth: {need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free",
                str(out),
            )
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        try:
            self._write_files(partial, progress or (lambda _: None))
            partial.chmod(0o755)
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return out

    def _write_files(self, folder: Path, progress: Callable[[int], None]) -> None:
        source, shards = Source(self.seed), self.shards()
        for name, tensors in shards.items():
            with open(folder / name, "wb", buffering=1 << 20) as f:
                f.write(_header(tensors, FORMATS[self.format].metadata))
                for t in tensors:
                    for chunk in source.chunks(t):
                        f.write(chunk)
                        progress(chunk.nbytes)
        if self.format == "jangtq2":
            (folder / "jangtq_runtime.safetensors").write_bytes(_sidecar(self.shape))
        if len(shards) > 1 or FORMATS[self.format].by_name or self.format == "jangtq2":
            extra = {"format": "jangtq"} if self.format == "jangtq2" else {}
            index = {
                "metadata": {**extra, "total_size": self.nbytes},
                "weight_map": {t.name: n for n, ts in shards.items() for t in ts},
            }
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        for name, text in self.files().items():
            (folder / name).write_text(text, encoding="utf-8")


def _header(tensors: list[Tensor], metadata: str | None) -> bytes:
    header: dict[str, dict] = {"__metadata__": {"format": metadata}} if metadata else {}
    offset = 0
    for t in tensors:
        end = offset + t.nbytes
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _sidecar(shape: Shape) -> bytes:
    """jangtq_runtime.safetensors: signs and codebook of both row lengths."""
    arrays = {}
    for columns in (shape.hidden, shape.moe):
        arrays[f"codebook.{columns}.2"] = jangtq_codebook(columns, 2)
        arrays[f"signs.{columns}.42"] = jangtq_signs(columns, 42)
    fills = {n: Fill("bytes", data=a.tobytes()) for n, a in sorted(arrays.items())}
    tensors = [Tensor(n, "F32", (len(f.data) // 4,), f, n) for n, f in fills.items()]
    return _header(tensors, None) + b"".join(f.data for f in fills.values())
