"""Options that several commands take, and what they do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from . import ops
from .errors import ContractError
from .kv import PRESETS

Directory = Annotated[Path, typer.Argument(help="A checkpoint directory.", show_default=False)]
Resident = Annotated[
    bool, typer.Option("--resident", help="Copy the weights into memory (huge pages on Linux).")
]
KV = Annotated[
    str,
    typer.Option(
        help=f"How keys and values are kept, one or one per attention layer: {', '.join(PRESETS)}."
    ),
]
Device = Annotated[
    str, typer.Option("--device", help="cpu, cuda (an NVIDIA GPU; cuda:1 the second) or mps.")
]
Rope = Annotated[
    str | None, typer.Option(help="yarn:4 reaches four times the context the model has.")
]
Threads = Annotated[
    int | None, typer.Option(help="Threads; all cores where not given.", min=1, max=ops.MAX_THREADS)
]


def set_threads(count: int | None) -> None:
    """Threads of this process, torch's too; None leaves them."""
    if count is not None:
        # torch reads it once, when it is first imported
        os.environ["OMP_NUM_THREADS"] = str(count)
        ops.set_threads(count)


def presets(kv: str) -> str | list[str]:
    """What ``--kv`` says: one preset, or those of the layers, with commas between."""
    return kv.split(",") if "," in kv else kv


def existing(directory: Path) -> Path:
    """The directory; ContractError where there is none."""
    if not directory.is_dir():
        raise ContractError(f"{directory} is not a directory")
    return directory
