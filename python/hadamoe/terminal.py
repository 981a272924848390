"""How the commands print: console, tables, amounts, a bar for bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table


def printable(text: str) -> str:
    """One line without control characters: names from a file must not drive the terminal."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def console(stderr: bool = False) -> Console:
    """Where results go, or with ``stderr`` what is said beside them."""
    # Wide enough off a terminal that no table wraps; no colours there either.
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 160
    return Console(highlight=False, markup=False, width=width, stderr=stderr)


def table(title: str, *columns: str, left: int = 1) -> Table:
    """A table whose first ``left`` columns are text and the others numbers."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < left else "right")
    return table


def amount(n: float) -> str:
    """12.34 G, 5.67 M, 8.9 k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n:.0f} "


@contextmanager
def bar(on: Console) -> Iterator[Callable[[int, int], None]]:
    """A progress bar to call with (bytes done, bytes in all); nothing is shown off a terminal."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=on, transient=True, disable=not on.is_terminal) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
