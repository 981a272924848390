"""``AutoModelForCausalLM.from_pretrained(DIR)`` for our directories; imports no transformers.

transformers has no entry point for third-party formats: its registries want a quant_method of our
own (three of the five formats carry none, the others belong to its own quantizers) or classes that
cost seconds to import. What every format has in common is the auto class, so importing it wraps
``from_pretrained``: a directory in one of our formats opens with `hadamoe.load`, all else goes on
as before.
"""

from __future__ import annotations

from typing import Any

from .import_hook import is_ours, when_imported

_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText")


def install() -> None:
    """Wraps the auto classes, now if they are imported and when they are otherwise."""
    when_imported("transformers.models.auto.modeling_auto", _wrap)


def _wrap(module: Any) -> None:
    for name in _CLASSES:
        cls = getattr(module, name)
        if not hasattr(cls.from_pretrained, "hadamoe"):
            cls.from_pretrained = classmethod(_ours(cls.from_pretrained.__func__, name))


def _ours(theirs: Any, name: str) -> Any:
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any, *args: Any, **options: Any
    ) -> Any:
        path = pretrained_model_name_or_path  # callers may name it
        if not is_ours(path):
            return theirs(cls, path, *args, **options)
        from . import torch_model

        return torch_model.from_pretrained(path, name != _CLASSES[0], *args, **options)

    from_pretrained.hadamoe = True  # type: ignore[attr-defined]
    from_pretrained.__doc__ = theirs.__doc__
    return from_pretrained
