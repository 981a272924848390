"""Checkpoints as plain dicts, to bend and write back; and one number per weight for comparing "
"them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hadamoe import reference
from hadamoe.checkpoint import DTYPES, INDEX, Checkpoint
from hadamoe.weight import Weight

Stored = tuple[str, tuple[int, ...], bytes]
SAFETENSORS = {
    "u1": "U8",
    "u4": "U32",
    "i4": "I32",
    "i8": "I64",
    "f2": "F16",
    "f4": "F32",
    "u2": "BF16",
}


def stored(array: np.ndarray, dtype: str | None = None) -> Stored:
    """An array as a tensor of a file; u2 means bf16 bits."""
    array = np.ascontiguousarray(array)
    return dtype or SAFETENSORS[array.dtype.str[1:]], array.shape, array.tobytes()


def header_bytes(header: Any) -> bytes:
    """A JSON header as it stands in a file, its length first."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def write_shard(path: Path, tensors: dict[str, Stored], align: int = 1) -> None:
    """A valid safetensors file, largest items first, header padded to ``align``."""
    header, at = {}, 0
    order = sorted(tensors, key=lambda n: (-DTYPES[tensors[n][0]].itemsize, n))
    for name in order:
        dtype, shape, data = tensors[name]
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [at, at + len(data)],
        }
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % align)
    path.write_bytes(header_bytes(text) + b"".join(tensors[n][2] for n in order))


@dataclass
class Raw:
    """A checkpoint directory in memory."""

    tensors: dict[str, Stored]
    json: dict[str, Any] = field(default_factory=dict)
    sidecars: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Raw:
        tensors = {}
        with Checkpoint.open(path) as ck:
            for name in ck.names():
                t = ck.tensor(name)
                tensors[name] = (t.dtype, t.shape, t.array.tobytes())
        jsons = {p.name: json.loads(p.read_text()) for p in path.glob("*.json") if p.name != INDEX}
        sidecars = {p.name: p.read_bytes() for p in path.glob("jangtq_runtime*")}
        return cls(tensors, jsons, sidecars)

    @property
    def config(self) -> dict[str, Any]:
        return self.json["config.json"]

    def array(self, name: str) -> np.ndarray:
        dtype, shape, data = self.tensors[name]
        return np.frombuffer(data, DTYPES[dtype]).reshape(shape)

    def rename(self, *pairs: tuple[str, str]) -> Raw:
        for old, new in pairs:
            self.tensors = {n.replace(old, new): t for n, t in self.tensors.items()}
        return self

    def write(self, path: Path, shards: int = 1) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        for name, value in self.json.items():
            (path / name).write_text(json.dumps(value))
        for name, data in self.sidecars.items():
            (path / name).write_bytes(data)
        if shards == 1:
            write_shard(path / "model.safetensors", self.tensors)
            return path
        names, index = sorted(self.tensors), {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {n: self.tensors[n] for n in names[i::shards]}
            write_shard(path / file, part)
            index |= dict.fromkeys(part, file)
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
        return path


def values(weight: Weight, expert: int = 0) -> np.ndarray:
    """f32 [rows, in_features] of one expert in the model's own basis, rotation undone."""
    one = Weight(weight.columns, (weight.parts[expert],), weight.rotation, weight.in_features)
    w = reference.dequantize(one, np.arange(one.rows))
    if one.rotation is not None:
        r = one.rotation
        w = reference.hadamard(w, block=r.block or 0, pre=r.post, post=r.pre)
    return w[:, : one.in_features]


def same_weights(a: dict[str, Weight], b: dict[str, Weight]) -> None:
    """Every weight holds the same codes, scales and instances, however its parts are cut."""
    assert a.keys() == b.keys()
    for path, weight in a.items():
        for left, right in zip(weight.parts, b[path].parts, strict=True):
            for get in (
                lambda p: p.codes.tobytes(),
                lambda p: b"" if p.scale is None else p.scale.tobytes(),
                lambda p: b"" if p.bias is None else p.bias.tobytes(),
            ):
                assert b"".join(map(get, left)) == b"".join(map(get, right)), path
            assert {p.instance for p in left} == {p.instance for p in right}, path
        assert weight.rotation == b[path].rotation, path
