"""What the hooks of other libraries share: to act when a module is imported, and on what."""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import UnsupportedError


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the real finders find one module, then changes it once it has run."""

    def __init__(self, name: str, change: Callable[[Any], None]) -> None:
        self.name, self.change = name, change

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                self.change(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def when_imported(name: str, change: Callable[[Any], None]) -> None:
    """Calls ``change(module)`` now if the module is imported, and when it is otherwise."""
    module = sys.modules.get(name)
    if module is not None:
        change(module)
    elif not any(isinstance(f, _Finder) and f.name == name for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, change))


def is_ours(directory: Any) -> bool:
    """This architecture in one of our formats; plain numbers are the other library's business."""
    from .formats import detect
    from .formats.config import MODEL_TYPES

    try:
        path = Path(directory)
        config = json.loads((path / "config.json").read_bytes())
        if config.get("model_type") not in MODEL_TYPES or not any(path.glob("*.safetensors")):
            return False
    except (OSError, TypeError, ValueError, AttributeError):
        return False  # a hub name, or not readable: let the other library say so
    try:
        return detect(path)[0] not in ("bf16", "f16", "f32")
    except UnsupportedError:
        return False
