#!/bin/bash
# What this project could only simulate, on a real NVIDIA GPU, in one command without network:
#
#     bash bench/gpu.sh [options of bench/gpu.py]
#
# Takes the Python 3.11+ named by PYTHON (python3) with its torch, transformers, nanobind, scikit-build-core, CMake,
# ninja and pytest, and the nvcc on PATH. Installs hadamoe into build/gpu-site, for this GPU alone; writes
# bench/results/gpu.json and gpu.txt. About 10 minutes with 16 CPU cores; 30 GB free in --folder.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
site=$PWD/build/gpu-site
started=$SECONDS
HM_CUDA=on "$python" -m pip install -q --no-index --no-deps --no-build-isolation --upgrade --target "$site" \
  -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native .
echo "built in $((SECONDS - started)) s"
PYTHONPATH=$site exec "$python" bench/gpu.py --built $((SECONDS - started)) "$@"
