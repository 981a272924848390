"""JSON from files nobody vouches for: no repeated keys, no NaN, no endless nesting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import FormatError

_LIMIT = 512_000_000  # bytes
_DEPTH = 32


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, read strictly (no repeated keys, no NaN); None where there is no file."""
    try:
        with open(path, "rb") as f:
            text = f.read(_LIMIT + 1)
    except FileNotFoundError:
        return None
    if len(text) > _LIMIT:
        raise FormatError(path, expected=f"at most {_LIMIT} bytes", found="more")
    value = parse_json(text, path, "a JSON object")
    if not _shallow(value, _DEPTH):
        raise FormatError(path, expected=f"at most {_DEPTH} levels of nesting", found="more")
    return value


def _shallow(value: Any, levels: int) -> bool:
    children = value.values() if type(value) is dict else value
    return levels > 0 and all(
        _shallow(child, levels - 1) for child in children if type(child) in (dict, list)
    )


class _Repeated(ValueError):
    pass


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Repeated(key)
            seen.add(key)
    return out


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def parse_json(text: bytes, path: Path, what: str) -> dict[str, Any]:
    """The JSON object ``text`` holds; FormatError says that ``what`` was expected of ``path``."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=_pairs, parse_constant=_constant)
    except _Repeated as e:
        raise FormatError(path, e.args[0], expected="each key once", found="it twice") from None
    except RecursionError:
        raise FormatError(path, expected=what, found="nesting too deep") from None
    except ValueError as e:
        raise FormatError(path, expected=what, found=str(e)) from None
    if type(value) is not dict:
        raise FormatError(path, expected=what, found=f"a {type(value).__name__}")
    return value
