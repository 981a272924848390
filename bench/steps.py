"""What reports made on a user's machine share: a step that breaks says so and the next runs."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import Any


def attempt(step: Callable[[], Any]) -> Any:
    """What a step measured, or how it broke."""
    try:
        return step()
    except Exception as error:
        traceback.print_exc()
        return {"broke": f"{type(error).__name__}: {error}", "where": traceback.format_exc()}


def attempts(rows: Iterator[dict[str, Any]], show: Callable[[dict[str, Any]], str]) -> list[Any]:
    """The rows of a step as far as it came; each is shown when it is there."""
    found = []
    while True:
        row = attempt(lambda: next(rows, None))
        if row is None:
            return found
        found.append(row)
        print(show(row) if "broke" not in row else f"broke: {row['broke']}", flush=True)
