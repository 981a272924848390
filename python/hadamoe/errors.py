"""Every error hadamoe raises on purpose. A message names the argument and the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike


class ContractError(ValueError):
    """An op was called with arguments its contract does not allow."""


class FormatError(ValueError):
    """A checkpoint is not what its format promises.

    Attributes: ``file`` (where), ``tensor`` (which, or None), ``expected`` and ``found`` (what).
    """

    def __init__(
        self,
        file: str | PathLike[str],
        tensor: str | None = None,
        *,
        expected: str,
        found: str,
    ) -> None:
        self.file, self.tensor, self.expected, self.found = str(file), tensor, expected, found
        where = self.file if tensor is None else f"{self.file}: {tensor}"
        super().__init__(f"{where}: expected {expected}, found {found}")


class UnsupportedError(NotImplementedError):
    """Valid input that this build, machine or version has no code for."""


class DeviceError(RuntimeError):
    """The device asked for is absent, too old or too small."""


@contextmanager
def reading(path: str | PathLike[str], expected: str) -> Iterator[None]:
    """Whatever another library raises over a file, as a FormatError; it names no file itself."""
    try:
        yield
    except ImportError:
        raise
    except Exception as e:
        found = f"{type(e).__name__}: {' '.join(str(e).split())}"
        raise FormatError(path, expected=expected, found=found) from e
