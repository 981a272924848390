"""Runs GPU kernels on the CPU, one fiber per thread, and reports what hardware hides."""

from .core import CheckError, Finding
from .toolchain import CompileError

__all__ = ["CheckError", "CompileError", "Finding"]
