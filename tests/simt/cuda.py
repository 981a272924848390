"""The CUDA side of the simulator: what kernel tests import.

from simt import cuda

kernel = cuda.compile_kernel(source, "scale<float>", check=True)
result = kernel([x, y, len(x), 2.0], grid=(4, 1, 1), block=(128, 1, 1), outputs=[1])

with cuda.installed(check=True) as log:
    ...  # code that calls mx.fast.cuda_kernel, or simt.cuda_launch.run
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec

from . import session
from .cuda_kernel import SHARED_LIMIT, Kernel, compile_kernel
from .toolchain import missing

__all__ = ["Kernel", "compile_kernel", "installed", "missing"]


@contextlib.contextmanager
def installed(**options) -> Iterator[list[session.Launch]]:
    """Inside, launches run in the simulator, those of `mx.fast.cuda_kernel` too where MLX is
    installed. Yields the log of launches.

    check: find races, bounds, uninitialised reads, masks (slower), count bytes. transactions: count
    memory lines too. findings: "raise" CheckError after the launch, or "keep" them in the log.
    threadgroup_limit: bytes of shared memory of a launch that asks for some. ftz: flush denormals,
    which nvcc does not by default. contract: a * b + c may round once. schedule of threads:
    ascending, descending or random (seed). warpgroups: kernels as sm_90a compiles them, with wgmma.
    """
    with session.opened(**{"ftz": False, "threadgroup_limit": SHARED_LIMIT, **options}) as log:
        if not find_spec("mlx"):
            yield log
            return
        from .mxcuda import patched

        with patched():
            yield log
