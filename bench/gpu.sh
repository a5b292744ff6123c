#!/usr/bin/env bash
# On any CUDA machine: the kernel tests on the GPU itself, then the benchmark; rows go to bench/results/kernels.csv.
# Needs torch, triton, pytest and pytest-timeout; run from the repository root with the project importable.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
"$PYTHON" -c "import torch; assert torch.cuda.is_available(), 'no CUDA device'; print(torch.cuda.get_device_name())"
"$PYTHON" -m pytest -q tests/kernels
"$PYTHON" bench/kernels.py "$@"
