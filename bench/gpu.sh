#!/usr/bin/env bash
# On any CUDA machine: all that a GPU can tell, in parts of ten minutes; arguments go to bench/gpu.py.
# Needs torch, triton, pytest and pytest-timeout, for the plot matplotlib; FlashInfer and vLLM are measured where they are
# installed. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m bench.gpu "$@"
