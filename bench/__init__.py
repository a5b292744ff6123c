"""The benchmarks; README.md beside this file says what each measures. They run as modules, from the repository root."""

import sys
from pathlib import Path

import vllm_wsi  # noqa: F401  # of this checkout: it is found here, before its folder leaves sys.path

# `python -m` puts the repository root on sys.path. There vLLM would find the folder `triton_kernels`, try it in place
# of Triton's own package of that name, and print a traceback.
sys.path[:] = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parents[1]]
