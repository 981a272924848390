"""``mlx_lm.load(DIR)`` for our directories, and so its generate, server and the rest.

mlx-lm finds a model's classes by name inside its own package; a checkpoint may bring a file of
code, but then its directory must be changed and its arrays still go through ``load_weights``. What
every entry of mlx-lm has in common is ``mlx_lm.utils.load_model``: importing that module wraps it.
A directory in one of our formats opens with `hadamoe.mlx_model`, all else goes on as before:

* plain bf16, f16 and f32 checkpoints;
* ``lazy=True``, which mlx-lm's converters and quantizers pass: they want the arrays themselves;
* callers with model classes of their own (``get_model_classes``);
* ``model_config={"hadamoe": False}``.

Other keys of ``model_config`` are options of `hadamoe.mlx_model.load_model`: kv, rope, dtype,
resident.
"""

from __future__ import annotations

from typing import Any

from .errors import UnsupportedError
from .import_hook import is_ours, when_imported

_OPTIONS = ("kv", "rope", "dtype", "resident")

#: what `load_model` gets where ``model_config`` does not say; the command line sets them
defaults: dict[str, Any] = {}


def install() -> None:
    """Wraps ``load_model``, now if mlx-lm is imported and when it is otherwise; its
    ``load_prompt_cache`` then knows our caches."""
    when_imported("mlx_lm.utils", _wrap)
    when_imported("mlx_lm.models.cache", _add_caches)


def _add_caches(_: Any) -> None:
    from . import mlx_cache  # noqa: F401  puts its classes there


def _wrap(module: Any) -> None:
    if not hasattr(module.load_model, "hadamoe"):
        module.load_model = _ours(module.load_model)


def _ours(theirs: Any) -> Any:
    def load_model(
        model_path: Any, lazy: bool = False, strict: bool = True,
        model_config: dict[str, Any] | None = None, *args: Any, **options: Any,
    ) -> Any:  # fmt: skip
        given = dict(model_config or {})
        wanted = given.pop("hadamoe", True)
        if lazy or not wanted or args or "get_model_classes" in options or not is_ours(model_path):
            return theirs(model_path, lazy, strict, given or None, *args, **options)
        unknown = [k for k, v in given.items() if k not in _OPTIONS and v]
        if unknown:
            raise UnsupportedError(
                f"load: model_config {unknown[0]!r} has no meaning for a hadamoe checkpoint, "
                f"it takes {', '.join(_OPTIONS)}"
            )
        from . import mlx_model

        ours = {k: v for k, v in given.items() if k in _OPTIONS}
        return mlx_model.load_model(model_path, **{**defaults, **ours})

    load_model.hadamoe = True  # type: ignore[attr-defined]
    load_model.__doc__ = theirs.__doc__
    return load_model
