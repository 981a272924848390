#!/bin/bash
# What this project could only simulate, on the real GPU of a Mac with Apple silicon:
#
#     bash bench/mac.sh                 compiles the package (needs the Command Line Tools)
#     bash bench/mac.sh FILE.whl ...    installs a wheel; options of bench/mac.py may follow
#
# Needs macOS 14, Python 3.11 or later, PyPI, and 30 GB of free disk for a while; takes about an hour.
# Makes .venv-mac in this checkout and hadamoe-mac.json, the report to send back.
set -euo pipefail

package=.
case "${1:-}" in *.whl) package=$(cd "$(dirname "$1")" && pwd)/$(basename "$1"); shift ;; esac
cd "$(dirname "$0")/.."

for python in python3.13 python3.12 python3.11 python3.14 python3; do
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
  python=
done
[ -n "$python" ] || { echo "bench/mac.sh: needs Python 3.11 or later (python.org, or: brew install python)"; exit 1; }

"$python" -m venv .venv-mac
.venv-mac/bin/pip install -q -c constraints.txt "$package[mlx]" pytest
exec .venv-mac/bin/python bench/mac.py "$@"
