"""``hadamoe`` and ``python -m hadamoe``; says what to install where a package is absent."""

from __future__ import annotations

import sys

INSTALL = "hadamoe: the command line needs {}; install it with: pip install 'hadamoe[cli]'"


def main() -> None:
    """Run the command line; exits with 1 after an error, 2 after wrong usage."""
    try:
        from . import cli
    except ModuleNotFoundError as e:
        if e.name not in ("typer", "rich", "click"):
            raise
        print(INSTALL.format(e.name), file=sys.stderr)
        sys.exit(1)
    cli.app()


if __name__ == "__main__":
    main()
