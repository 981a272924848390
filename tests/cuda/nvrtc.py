"""Compiles CUDA texts as MLX does: with NVRTC, which needs no GPU and no driver."""

from __future__ import annotations

import ctypes as C
from functools import cache
from pathlib import Path

#: The headers of the one that MLX embeds.
UTILS = b"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
#include <cuda/std/limits>
#include <cuda/std/tuple>
"""


def folder() -> Path | None:
    """Where NVIDIA's PyPI packages are, nvidia-cuda-nvrtc among them; None where it is not."""
    try:
        import nvidia.cu13
    except ImportError:
        return None
    found = [Path(p) for p in nvidia.cu13.__path__]
    return next((p for p in found if (p / "lib" / "libnvrtc.so.13").exists()), None)


@cache
def _library() -> C.CDLL:
    lib = folder() / "lib"
    C.CDLL(str(lib / "libnvrtc-builtins.so.13.0"), C.RTLD_GLOBAL)  # else it is looked for elsewhere
    return C.CDLL(str(lib / "libnvrtc.so.13"))


def compile_text(text: str, name: str, architecture: str = "sm_90a") -> str:
    """The PTX of a text of `mx.fast.cuda_kernel`, with the options of MLX's jit_module.cpp.

    Raises:
        AssertionError: with the compiler's messages.
    """
    nvrtc, program = _library(), C.c_void_p()
    header = C.c_char_p(UTILS), C.c_char_p(b"mlx/backend/cuda/device/utils.cuh")
    made = nvrtc.nvrtcCreateProgram(
        C.byref(program), text.encode(), b"kernel.cu", 1, *map(C.byref, header)
    )
    assert made == 0
    try:
        expression = f"mlx::core::cu::{name}".encode()
        assert nvrtc.nvrtcAddNameExpression(program, expression) == 0
        options = [
            b"--device-as-default-execution-space",
            f"--gpu-architecture={architecture}".encode(),
            f"--include-path={folder()}/include/cccl".encode(),
            f"--include-path={folder()}/include".encode(),
        ]
        given = (C.c_char_p * len(options))(*options)
        failed = nvrtc.nvrtcCompileProgram(program, len(options), given)
        assert not failed, _text(program, "ProgramLog")
        assert nvrtc.nvrtcGetLoweredName(program, expression, C.byref(C.c_char_p())) == 0
        return _text(program, "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(C.byref(program))


def _text(program: C.c_void_p, what: str) -> str:
    """The program's log or PTX."""
    size = C.c_size_t()
    getattr(_library(), f"nvrtcGet{what}Size")(program, C.byref(size))
    buffer = C.create_string_buffer(size.value)
    getattr(_library(), f"nvrtcGet{what}")(program, buffer)
    return buffer.value.decode()
