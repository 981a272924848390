"""The CUDA kernels of cuda/*.cu, by name. Importing needs no driver; every call but kernels() and
architectures() does, and raises DeviceError where there is none, or one too old."""

from collections.abc import Sequence
from typing import Any

def kernels() -> list[str]:
    """Names of the kernels compiled in: the C++ text, `hadamard<4>`."""

def architectures() -> str:
    """What the kernels are compiled for, as CMAKE_CUDA_ARCHITECTURES has it."""

def devices() -> list[str]:
    """Names of the GPUs. Raises DeviceError where there is none."""

def device(index: int) -> dict[str, Any]:
    """A GPU: name, capability (major, minor), multiprocessors, memory and memory_free (bytes),
    l2_bytes, shared_bytes (of a block, at most), driver and runtime (the newest CUDA of each)."""

def load(device: int) -> None:
    """Bring all kernels to a device: once, before a graph is captured.

    Raises DeviceError, with the figures, if this build has no code for the device.
    """

def launch(
    name: str,
    arrays: Sequence[Any],
    sizes: Sequence[int | float],
    groups: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    stream: int | None = None,
    overlap: bool = True,
) -> None:
    """Start a kernel. Neither waits nor allocates; legal while a stream is captured.

    Args:
        arrays: contiguous, on one CUDA device, None for an absent one; element types and lengths
            are not checked. They must live until the kernel has run.
        sizes: int32 and floats (their f32 bits are handed over).
        groups: thread blocks in x, y, z.
        shared_bytes: of dynamic shared memory.
        stream: a cudaStream_t; None: the current one of the arrays' framework.
        overlap: the kernel may begin before its predecessors in the stream end, and waits itself
            (code compiled for 9.0 and later).

    Raises KeyError (no such kernel), ContractError (arguments) and DeviceError (CUDA's error, with
    kernel and figures).
    """

class Launch:
    """launch() but for its arrays and stream: checked and converted once, called often."""

    def __init__(
        self,
        name: str,
        sizes: Sequence[int | float],
        groups: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        overlap: bool = True,
    ) -> None: ...
    def __call__(self, arrays: Sequence[Any], stream: int | None = None) -> None: ...
