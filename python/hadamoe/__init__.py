"""hadamoe: Qwen3.6-35B-A3B from its five published low-bit formats, on native kernels.

`load` opens a checkpoint directory; `ops` are the kernels for numpy, torch and MLX arrays;
`reference` says in numpy what each op means; `formats` reads the checkpoints.
"""

from __future__ import annotations

from typing import Any

from . import mlx_lm_hook, ops, transformers_hook
from .errors import ContractError, DeviceError, FormatError, UnsupportedError
from .ops import isa, isas, set_isa, set_threads, threads
from .weight import Instance, Part, Rotation, Weight

__version__ = "0.1.0"

__all__ = [
    "ContractError",
    "DeviceError",
    "FormatError",
    "Instance",
    "Part",
    "Rotation",
    "UnsupportedError",
    "Weight",
    "isa",
    "isas",
    "load",
    "ops",
    "set_isa",
    "set_threads",
    "threads",
]


def load(
    directory: str,
    *,
    framework: str = "torch",
    dtype: Any = None,
    device: str = "cpu",
    **options: Any,
) -> tuple[Any, Any]:
    """Open a checkpoint directory as a ready model and its tokenizer.

    Args:
        directory: one of the five formats, or a plain BF16/F16 source.
        framework: ``"torch"``: the transformers model with hadamoe's modules in place of linears,
            embeddings, experts and the gated delta net. ``"mlx"``: mlx-lm's model and tokenizer,
            as ``mlx_lm.load`` gives them, with hadamoe's modules in the same places.
        dtype: of activations (a dtype of the framework or its name); None takes the checkpoint's.
        device: for torch ``"cpu"``, ``"cuda"``, an NVIDIA GPU, or ``"mps"``, a Mac's; MLX runs on
            ``mx.default_device()`` whatever this says.
        options: ``rope="yarn:4"`` reaches four times the context the model was trained for
            (1,048,576 tokens; a dict merges any rope settings); ``kv="hk4v3"`` keeps keys and
            values in 4 and 3 bits (`hadamoe.kv` lists presets); ``vision=False`` leaves a vision
            tower out (MLX has none); ``resident=True`` copies the weights into memory (huge pages
            on Linux) instead of mapping their files.

    Returns:
        (model, tokenizer); tokenizer is None where the directory has none.

    Raises:
        FormatError: the directory is not what its format promises.
        UnsupportedError: it needs an instance, framework or device this build lacks.
        DeviceError: weights need more memory than is available, or the device is not there.
        ModuleNotFoundError: the packages of ``hadamoe[torch]`` or ``hadamoe[mlx]`` are not
            installed.
    """
    if framework not in ("torch", "mlx"):
        raise UnsupportedError(f"load: framework is {framework!r}, needs 'torch' or 'mlx'")
    try:
        if framework == "mlx":
            from . import mlx_model as model
        else:
            from . import torch_model as model

            options["device"] = device
    except ModuleNotFoundError as e:
        if e.name not in ("torch", "transformers", "mlx", "mlx.core", "mlx_lm"):
            raise
        message = f"load: needs {e.name}; install it with: pip install 'hadamoe[{framework}]'"
        raise ModuleNotFoundError(message, name=e.name) from None

    return model.load(directory, dtype=dtype, **options)


transformers_hook.install()
mlx_lm_hook.install()
