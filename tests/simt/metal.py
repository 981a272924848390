"""The Metal side of the simulator: what kernel tests import.

from simt import metal

with metal.installed(check=True) as log:
    ...  # code that calls mx.fast.metal_kernel
"""

from __future__ import annotations

from .mxfast import installed
from .toolchain import missing

__all__ = ["installed", "missing"]
