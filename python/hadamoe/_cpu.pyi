"""The native module: the op table, the instances compiled in, and who runs them."""

from collections.abc import Sequence
from typing import Any

def call(
    op: str,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    ints: Sequence[int],
    floats: Sequence[float],
) -> None:
    """Run one op on CPU arrays of any framework; outputs are written in place.

    Raises ContractError, naming argument and numbers, before anything is written.
    """

def check(
    op: str,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    ints: Sequence[int],
    floats: Sequence[float],
) -> None:
    """What call() checks before it runs, for arrays of another device: (shape, DLPack's type code,
    bits) stands for one; outputs are such tuples.

    Raises ContractError, naming argument and numbers.
    """

class Bound:
    """An op with the arguments that stay given, and checked, once.

    `...` in ``inputs`` and ``ints`` stands for what every call brings, in that order. The arrays
    are kept alive; tables of parts are copied. Calls may run side by side.
    """

    @property
    def op(self) -> str:
        """The op's name."""

    def __init__(
        self,
        op: str,
        inputs: Sequence[Any],
        outputs: int,
        ints: Sequence[Any],
        floats: Sequence[float],
    ) -> None: ...
    def __call__(
        self, inputs: Sequence[Any], outputs: Sequence[Any], ints: Sequence[int]
    ) -> None: ...

def ops() -> list[str]:
    """Names of the ops."""

def op(name: str) -> Any:
    """The op's ``hm_op`` (csrc/core/abi.h) in a capsule, for another extension. Raises KeyError."""

def instances() -> list[tuple[str, int, str]]:
    """(table, bits, scale) of every compiled instance, in the order of csrc/core/instances.h."""

def kv_codecs() -> list[tuple[str, int]]:
    """(name, bits) of every codec of a cache's pages, in order of their numbers."""

def kv_page_bytes(codec: int, head_dim: int) -> int:
    """Bytes of a page of one head and one side."""

def isas() -> list[str]:
    """Instruction sets this machine runs, best last."""

def isa() -> str:
    """The instruction set in use."""

def set_isa(name: str) -> None:
    """Use another of isas(). Raises ValueError."""

def threads() -> int:
    """Threads an op may use."""

def set_threads(count: int) -> None:
    """Use count threads (>= 1). Not while an op runs."""

def count_products(on: bool) -> None:
    """Begin or cease to count in products()."""

def products() -> tuple[int, int]:
    """(nanoseconds inside products with weights, bytes of weights they read), since the process
    began and while counting was on."""
