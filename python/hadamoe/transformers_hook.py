"""``AutoModelForCausalLM.from_pretrained(DIR)`` for our directories; imports no transformers.

transformers has no entry point for third-party formats: its registries want a quant_method of our
own (three of the five formats carry none, the others belong to its own quantizers) or classes that
cost seconds to import. What every format has in common is the auto class, so importing it wraps
``from_pretrained``: a directory in one of our formats opens with `hadamoe.load`, all else goes on
as before.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from .errors import UnsupportedError

_MODULE = "transformers.models.auto.modeling_auto"
_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText")


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the real finders find the module, then wraps its classes once it has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                _wrap(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Wraps the auto classes, now if they are imported and when they are otherwise."""
    module = sys.modules.get(_MODULE)
    if module is not None:
        _wrap(module)
    elif not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _wrap(module: Any) -> None:
    for name in _CLASSES:
        cls = getattr(module, name)
        if not hasattr(cls.from_pretrained, "hadamoe"):
            cls.from_pretrained = classmethod(_ours(cls.from_pretrained.__func__, name))


def _is_ours(directory: Any) -> bool:
    """This architecture in one of our formats; plain numbers are transformers' own business."""
    from .formats import detect
    from .formats.config import MODEL_TYPES

    try:
        path = Path(directory)
        config = json.loads((path / "config.json").read_bytes())
        if config.get("model_type") not in MODEL_TYPES or not any(path.glob("*.safetensors")):
            return False
    except (OSError, TypeError, ValueError, AttributeError):
        return False  # a hub name, or not readable: let transformers say so
    try:
        return detect(path)[0] not in ("bf16", "f16", "f32")
    except UnsupportedError:
        return False


def _ours(theirs: Any, name: str) -> Any:
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any, *args: Any, **options: Any
    ) -> Any:
        path = pretrained_model_name_or_path  # callers may name it
        if not _is_ours(path):
            return theirs(cls, path, *args, **options)
        from . import torch_model

        return torch_model.from_pretrained(path, name != _CLASSES[0], *args, **options)

    from_pretrained.hadamoe = True  # type: ignore[attr-defined]
    from_pretrained.__doc__ = theirs.__doc__
    return from_pretrained
