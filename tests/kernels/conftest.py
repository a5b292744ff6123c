"""Kernel tests run on a GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported: `tests/test_kernels.py` runs this folder in a process of
its own with TRITON_INTERPRET=1; on a GPU machine `pytest tests/kernels` runs it as it is.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not (INTERPRETED or torch.cuda.is_available()):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


def pytest_generate_tests(metafunc):
    """`dtype`: all that the kernels take; the interpreter multiplies bfloat16 as raw bits, so there it is left out."""
    if "dtype" in metafunc.fixturenames:
        names = ["float16", "float32"] if INTERPRETED else ["bfloat16", "float16", "float32"]
        metafunc.parametrize("dtype", [getattr(torch, name) for name in names], ids=names)
