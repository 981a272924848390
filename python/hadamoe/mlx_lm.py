"""mlx-lm's command line for our directories: ``python -m hadamoe.mlx_lm server --model DIR``.

mlx-lm has no hook that works without importing something first, so this imports hadamoe and hands
over to mlx-lm's own ``main``. Options of ours stand in front of mlx-lm's command:

    python -m hadamoe.mlx_lm --kv hk4v3 generate --model DIR --prompt "def fib(n):"
"""

from __future__ import annotations

import argparse
import sys

from . import mlx_lm_hook


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m hadamoe.mlx_lm", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--kv", help="presets of hadamoe.kv: one, or one per attention layer, ...")
    parser.add_argument("--rope", help="yarn:FACTOR for longer contexts")
    parser.add_argument("--dtype", help="of keys and values: float32, bfloat16 or float16")
    parser.add_argument("--resident", action="store_true", help="copy the weights into memory")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="of mlx-lm, with its options")
    given = vars(parser.parse_args())
    command = given.pop("command")
    if not command:
        parser.error("needs a command of mlx-lm: generate, chat, server, ...")
    kv = given["kv"]
    given["kv"] = kv.split(",") if kv and "," in kv else kv
    mlx_lm_hook.defaults.update({k: v for k, v in given.items() if v})
    try:
        from mlx_lm import cli
    except ModuleNotFoundError as e:
        if e.name not in ("mlx", "mlx.core", "mlx_lm"):
            raise
        parser.error(f"needs {e.name}; install it with: pip install 'hadamoe[mlx]'")
    sys.argv = ["mlx_lm", *command]
    cli.main()


if __name__ == "__main__":
    main()
