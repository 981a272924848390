"""The CUDA side of the simulator: what kernel tests import.

from simt import cuda

kernel = cuda.compile_kernel(source, "scale<float>", check=True)
result = kernel([x, y, len(x), 2.0], grid=(4, 1, 1), block=(128, 1, 1), outputs=[1])

with cuda.installed(check=True) as log:
    ...  # code that calls mx.fast.cuda_kernel
"""

from __future__ import annotations

from .cuda_kernel import Kernel, compile_kernel
from .mxcuda import installed
from .toolchain import missing

__all__ = ["Kernel", "compile_kernel", "installed", "missing"]
