"""A machine with GPUs that are not there: arrays that claim to lie on one, and the runtime of
fake_cuda_runtime.cpp behind `_cuda`."""

from __future__ import annotations

import ctypes
import json
from ctypes import POINTER, Structure, c_int, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

CUDA, HOST = 2, 1


class Machine(Structure):
    """What the runtime answers; errors are numbers of cudaError_t, of the next call alone."""

    _fields_ = [
        (name, c_int)
        for name in (
            "driver", "devices", "major", "minor", "shared", "static_shared", "ptx",
            "launch_error", "attributes_error",
        )
    ]  # fmt: skip


class Runtime:
    """The runtime inside a module that was linked with it."""

    def __init__(self, module: Path) -> None:
        self._library = ctypes.CDLL(str(module))
        self._library.fake_calls.restype = ctypes.c_char_p

    def reset(self, **facts: int) -> None:
        """Another machine, an H200's by default; no calls yet."""
        known = {"driver": 13000, "devices": 2, "major": 9, "shared": 232448, "ptx": 90}
        self._library.fake_reset(ctypes.byref(Machine(**(known | facts))))

    @property
    def calls(self) -> list[dict[str, Any]]:
        """What the module asked for, in order; questions about the device are left out."""
        return [json.loads(line) for line in self._library.fake_calls().decode().splitlines()]

    @property
    def launches(self) -> list[dict[str, Any]]:
        """The launches among the calls."""
        return [call for call in self.calls if call["call"] == "cudaLaunchKernelExC"]


class DLTensor(Structure):
    """DLPack's struct of this name."""

    _fields_ = [
        ("data", c_void_p), ("device_type", c_int32), ("device", c_int32), ("ndim", c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", POINTER(c_int64)), ("strides", POINTER(c_int64)), ("byte_offset", c_uint64),
    ]  # fmt: skip


class Array:
    """An array of float32 as DLPack lends it; memory at ``address``, which nothing touches."""

    def __init__(
        self, address: int, shape: tuple[int, ...], strides: tuple[int, ...] | None = None,
        device: tuple[int, int] = (CUDA, 0), offset: int = 0,
    ) -> None:  # fmt: skip
        self.shape = (c_int64 * len(shape))(*shape)
        self.strides = None if strides is None else (c_int64 * len(strides))(*strides)
        self.tensor = DLTensor(
            address, *device, len(shape), 2, 32, 1, self.shape, self.strides, byte_offset=offset
        )


_LEND = ctypes.PYFUNCTYPE(c_int, ctypes.py_object, POINTER(DLTensor))
_STREAM = ctypes.PYFUNCTYPE(c_int, c_int32, c_int32, POINTER(c_void_p))
#: (device type, device) -> stream.
STREAMS: dict[tuple[int, int], int] = {}


@_LEND
def _lend(array: Array, out: Any) -> int:
    out[0] = array.tensor
    return 0


@_STREAM
def _stream(kind: int, device: int, out: Any) -> int:
    out[0] = STREAMS[kind, device]
    return 0


class _ExchangeAPI(Structure):
    """DLPack 1.3: the table of functions behind a type's ``__dlpack_c_exchange_api__``."""

    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("previous", c_void_p),
        ("allocator", c_void_p), ("from_object", c_void_p), ("to_object", c_void_p),
        ("lend", _LEND), ("stream", _STREAM),
    ]  # fmt: skip


_NAME = b"dlpack_exchange_api"
_API = _ExchangeAPI(1, 3, None, None, None, None, _lend, _stream)
_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, [c_void_p, ctypes.c_char_p, c_void_p]
Array.__dlpack_c_exchange_api__ = _new(ctypes.addressof(_API), _NAME, None)
