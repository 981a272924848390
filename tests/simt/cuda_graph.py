"""A stand-in for the GPU of `hadamoe.torch_cuda`: launches run in the simulator, on CPU tensors,
and a graph is what was recorded of them.

While a graph is recorded nothing runs, as on a GPU: new tensors hold NaN, states stay as they were.
Replaying runs what was recorded on the tensors of that time, and nothing else: a step that looked
at a number, or computed something in Python, goes on with what it saw then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hadamoe import torch_cuda
from hadamoe.cuda_plan import Launch

from . import cuda, cuda_launch, session

#: Operators that read a number back, which no graph can.
_WAITING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal")


class Recording(TorchDispatchMode):
    """Notes launches and torch's operators in ``todo`` instead of running them."""

    def __init__(self) -> None:
        super().__init__()
        self.todo: list[tuple[str, Callable[[], Any]]] = []

    def launch(self, launch: Launch, arrays: Sequence[torch.Tensor | None]) -> None:
        self.todo.append((launch.name, lambda: _run(launch, arrays)))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name in _WAITING:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        if func._schema.is_mutable:
            written = [args[0] if args else kwargs["out"]]
            self.todo.append((name, lambda: func(*args, **kwargs)))
            return kwargs.get("out", written[0])
        result = func(*args, **kwargs)
        ours = {a.untyped_storage()._cdata for a in tree_leaves((args, kwargs)) if _is_tensor(a)}
        for made in filter(_is_tensor, tree_leaves(result)):
            if made.untyped_storage()._cdata in ours:
                return result  # a view: nothing to run
            _forget(made)
        if not name.startswith(("empty", "new_empty")):
            self.todo.append((name, lambda: _again(func, args, kwargs, result)))
        return result


def _is_tensor(a: Any) -> bool:
    return isinstance(a, torch.Tensor)


def _forget(a: torch.Tensor) -> None:
    """Memory that nobody wrote."""
    if a.is_floating_point():
        a.fill_(float("nan"))
    elif a.dtype != torch.bool:
        a.fill_(torch.iinfo(a.dtype).max // 3)


def _again(func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
    """Computes what was recorded anew, into the tensors of that time."""
    for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
        if _is_tensor(old):
            old.copy_(new)


def _run(launch: Launch, arrays: Sequence[torch.Tensor | None]) -> None:
    names = [*launch.inputs, *(out.name for out in launch.outputs)]
    cuda_launch.run(launch, {n: a for n, a in zip(names, arrays, strict=True) if a is not None})


class Machine:
    """In the place of `torch_cuda.machine`.

    Attributes:
        free: bytes it says are free.
        graphs: names of what each recorded graph runs, in order.
    """

    def __init__(self, free: int = 1 << 40) -> None:
        self.free, self.graphs = free, []
        self._recording: Recording | None = None

    def device(self, wanted: torch.device) -> torch.device:
        return torch.device("cpu")

    def launch(self, launch: Launch, arrays: Sequence[torch.Tensor | None]) -> None:
        if self._recording is not None:
            self._recording.launch(launch, arrays)
        else:
            _run(launch, arrays)

    def array(self, array: np.ndarray, device: torch.device) -> torch.Tensor:
        if self._recording is not None:
            raise RuntimeError("a copy to the GPU while a graph is recorded")
        return torch.from_numpy(np.array(array, order="C"))

    def free_bytes(self, device: torch.device) -> int:
        return self.free

    def capture(self, step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        with Recording() as self._recording:
            try:
                step()
            finally:
                recorded, self._recording = self._recording, None
        self.graphs.append([name for name, _ in recorded.todo])

        def replay() -> None:
            for _, action in recorded.todo:
                action()

        return replay

    def reader(self, like: torch.Tensor) -> Callable[[torch.Tensor], Callable[[], torch.Tensor]]:
        def start(x: torch.Tensor) -> Callable[[], torch.Tensor]:
            copy = x.clone()
            return lambda: copy

        return start


@contextlib.contextmanager
def installed(
    free: int = 1 << 40, **options: Any
) -> Iterator[tuple[Machine, list[session.Launch]]]:
    """Inside, device "cuda" of hadamoe is the simulator. Options as those of `cuda.installed`.

    Yields the machine and the log of launches.
    """
    old, torch_cuda.machine = torch_cuda.machine, Machine(free)
    torch_cuda.front.cache_clear()
    try:
        with cuda.installed(**options) as log:
            yield torch_cuda.machine, log
    finally:
        torch_cuda.machine = old
        torch_cuda.front.cache_clear()
