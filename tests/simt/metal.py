"""The Metal side of the simulator: what kernel tests import.

from simt import metal

with metal.installed(check=True) as log:
    ...  # code that calls mx.fast.metal_kernel
"""

from __future__ import annotations

from .lint import lint
from .msl import compile_kernel
from .session import Launch, Options, variants
from .toolchain import missing

__all__ = ["Launch", "Options", "compile_kernel", "lint", "missing", "variants"]


def __getattr__(name: str):
    """`installed` and `mps_installed`, each of which imports its framework."""
    if name == "installed":
        from .mxfast import installed

        return installed
    if name == "mps_installed":
        from .mps import mps_installed

        return mps_installed
    raise AttributeError(name)
