"""What MLX would compile for calls of ours on CUDA: recorded, not run, and compiled by NVRTC."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import nvrtc
from simt import mxcuda, mxfast

from hadamoe import mlx_cuda

#: Seconds that NVRTC may take for a text, on a machine with other work: a user waits for it.
PATIENCE = 60


def texts_of(call: Callable[[], Any]) -> dict[str, str]:
    """Text -> its function's name, of all launches of a call, whose results are zeros. Texts that
    differ in a name alone, which counts bytes of shared memory, are one."""
    texts: dict[str, str] = {}

    def cuda_kernel(name, input_names, output_names, source, header, shared_memory):
        name, counted = re.sub(rf"_{shared_memory}$", "", name), name
        source, header = (text.replace(counted, name) for text in (source, header))

        def launch(*, inputs, output_shapes, output_dtypes, **_):
            made = name, input_names, output_names, source, header, inputs, output_dtypes, []
            kernel, text = mxcuda.generate(*made)
            texts[text] = kernel
            return [mx.zeros(*each) for each in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    mlx_cuda._kernel.cache_clear()
    try:
        with mxfast.has_gpu(mx.cuda, cuda_kernel):
            call()
    finally:
        mlx_cuda._kernel.cache_clear()
    return texts


def kernel_of(text: str) -> str:
    """The kernel's C++ name, as ``cuda/*.cu`` list it."""
    return re.search(r"hm::([^:]+)::run\(", text)[1]


def compiles(texts: dict[str, str]) -> None:
    """Holds every text to be compiled, to PTX, and soon: from there on ptxas has seen the same
    kernels in tests/packaging."""

    def one(text: str, name: str) -> tuple[str, float]:
        begin = time.perf_counter()
        ptx = nvrtc.compile_text(text, name, "compute_90a")
        assert ".maxntid" in ptx  # the bounds of launches that the struct has
        return kernel_of(text), time.perf_counter() - begin

    with ThreadPoolExecutor(2) as pool:
        took = list(pool.map(one, texts.keys(), texts.values()))
    slow = [(name, seconds) for name, seconds in took if seconds > PATIENCE]
    assert not slow


def kernels_of(calls: Iterable[Callable[[], object]]) -> set[str]:
    """Names of the kernels in the texts of calls."""
    return {kernel_of(text) for call in calls for text in texts_of(call)}
