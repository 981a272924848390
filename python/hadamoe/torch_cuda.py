"""PyTorch's operators ``torch.ops.hadamoe.*`` on CUDA, and all that touches a GPU itself.

Kernels are those ``_cuda`` has compiled; a launch goes to torch's current stream, over memory of
its allocator, and waits for nothing, so CUDA graphs may record it. Importing this registers the
operators and needs no GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from . import cuda_delta, cuda_kv, cuda_moe, cuda_products
from .cuda_plan import Launch
from .errors import DeviceError
from .gpu_calls import Front, Plans
from .torch_gpu import new_front, register

Tensor = torch.Tensor

#: Compute capability that kernels are written for, at least.
OLDEST = (8, 0)
_STAGED = 16 << 20  # bytes of a staging buffer; smaller arrays do not need one
_HOW = (
    "build it where nvcc is on the PATH, or with the compiler from PyPI: HM_CUDA=pypi pip install ."
)


class Machine:
    """What CUDA itself does for us. Tests put a simulator in its place (`machine`)."""

    def device(self, wanted: torch.device) -> torch.device:
        """The GPU, with its number.

        Raises:
            DeviceError: torch or hadamoe was built without CUDA, there is no GPU or no such one,
                its driver is too old for this build, or the GPU is older than our kernels.
        """
        if torch.version.cuda is None:
            raise DeviceError(
                f"load: device='{wanted}' needs a torch with CUDA, torch {torch.__version__} was "
                "built without"
            )
        names = _library().devices()
        if not torch.cuda.is_available():
            raise DeviceError(
                f"load: device='{wanted}': {names[0]} is there, but torch {torch.__version__} "
                f"(CUDA {torch.version.cuda}) cannot use it; its driver may be too old for torch"
            )
        index = torch.cuda.current_device() if wanted.index is None else wanted.index
        if index >= len(names):
            raise DeviceError(f"load: device='{wanted}': there are {len(names)} GPUs")
        found = torch.cuda.get_device_capability(index)
        if found < OLDEST:
            raise DeviceError(
                f"load: {names[index]} has compute capability {found[0]}.{found[1]}, the kernels "
                f"need {OLDEST[0]}.{OLDEST[1]} or newer"
            )
        _library().load(index)  # or a graph's first launches would have to
        return torch.device(wanted.type, index)

    def launch(self, launch: Launch, arrays: Sequence[Tensor | None]) -> None:
        """Starts a kernel on torch's current stream; arrays are its inputs, then its outputs."""
        sizes = list(launch.sizes.values())
        _library().launch(launch.name, arrays, sizes, launch.groups, launch.threads, launch.shared)

    def array(self, array: np.ndarray, device: torch.device) -> Tensor:
        """A copy in the GPU's memory."""
        if array.nbytes < _STAGED:
            return torch.from_numpy(np.array(array, order="C")).to(device)
        return _staging(device).copy(array)

    def free_bytes(self, device: torch.device) -> int:
        """Memory of the GPU that can be taken."""
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused

    def capture(self, step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """``step`` recorded as one CUDA graph, not run; what it returns runs it."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        current = torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # torch.cuda.graph would collect garbage first
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        current.wait_stream(stream)
        return graph.replay

    def reader(self, like: Tensor) -> Callable[[Tensor], Callable[[], Tensor]]:
        """Copies tensors of one shape to the CPU: starts a copy and returns what waits for it."""
        kept = [torch.empty(like.shape, dtype=like.dtype, pin_memory=True) for _ in range(2)]
        turn = 0

        def start(x: Tensor) -> Callable[[], Tensor]:
            nonlocal turn
            turn = 1 - turn
            to, event = kept[turn], torch.cuda.Event()
            to.copy_(x, non_blocking=True)
            event.record()

            def wait() -> Tensor:
                event.synchronize()
                return to

            return wait

        return start


#: The one there is.
machine = Machine()


@cache
def _library() -> Any:
    try:
        from . import _cuda
    except ImportError as e:
        why = "" if isinstance(e, ModuleNotFoundError) else f" ({e})"
        raise DeviceError(f"this hadamoe was built without CUDA kernels{why}; {_HOW}") from None
    return _cuda


class Staging:
    """Copies arrays to a GPU through two pinned buffers, on a stream of its own: while one is on
    its way the other is filled, and whoever packs the next array need not wait.

    Args:
        size: bytes of a buffer.
    """

    def __init__(self, device: torch.device, size: int = _STAGED) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.sent = [torch.cuda.Event() for _ in range(2)]
        self.turn, self.lock = 0, threading.Lock()

    def copy(self, array: np.ndarray) -> Tensor:
        """A copy in the GPU's memory, there for whatever comes later on the current stream."""
        source = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        with self.lock, torch.cuda.device(self.device):
            current = torch.cuda.current_stream(self.device)
            result = torch.empty(source.numel(), dtype=torch.uint8, device=self.device)
            self.stream.wait_stream(current)  # the memory may have been another array's
            with torch.cuda.stream(self.stream):
                pieces = zip(source.split(len(self.buffers[0])), result.split(len(self.buffers[0])),
                             strict=True)  # fmt: skip
                for piece, to in pieces:
                    self.send(piece, to)
            current.wait_stream(self.stream)
        empty = torch.from_numpy(np.empty(0, array.dtype))
        return result.view(empty.dtype).view(array.shape)

    def send(self, piece: Tensor, to: Tensor) -> None:
        """Fills the older buffer, once it has been sent, and sends it."""
        self.turn = 1 - self.turn
        self.sent[self.turn].synchronize()
        buffer = self.buffers[self.turn][: len(piece)]
        buffer.copy_(piece)
        self.late(to, buffer)
        self.sent[self.turn].record(self.stream)

    @staticmethod
    def late(to: Tensor, buffer: Tensor) -> None:
        """Copies when the stream comes to it."""
        to.copy_(buffer, non_blocking=True)


@cache
def _staging(device: torch.device) -> Staging:
    return Staging(device)


@cache
def _numbers(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Integers in the GPU's memory, as i32; kept, so a graph finds them there."""
    return torch.tensor(values, dtype=torch.int32, device=device)


def run(launch: Launch, arrays: Mapping[str, Tensor | Sequence[int]]) -> list[Tensor]:
    """The outputs of a launch, one tensor for each.

    Args:
        arrays: every input that is not absent and outputs that are there already, by name;
            integers are handed over as int32.
    """
    device = next(a.device for a in map(arrays.get, launch.present) if isinstance(a, Tensor))
    inputs: list[Tensor | None] = []
    for name, there in launch.inputs.items():
        a = arrays[name] if there else None
        if there and not isinstance(a, Tensor):
            a = _numbers(tuple(a), device)
        inputs.append(a if a is None else a.contiguous())
    outputs = []
    for out in launch.outputs:
        given = arrays.get(out.name)
        if given is None:
            given = torch.empty(out.shape, dtype=getattr(torch, out.dtype), device=device)
        outputs.append(given)
    machine.launch(launch, [*inputs, *outputs])
    return outputs


@cache
def front(device: torch.device) -> Front:
    """The front end of CUDA launches on tensors of a device."""
    plans = Plans(cuda_products, cuda_moe, cuda_delta, cuda_kv)
    return new_front(plans, lambda a: machine.array(a, device), run)


#: name -> operator
OPERATORS = register(lambda x: front(x.device), "CUDA")
