"""Runs the folder `interpreted` in Triton's interpreter, which must be chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parent / "interpreted"


def test_the_interpreted_kernels_pass():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER)]
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=FOLDER.parents[2], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-5000:]
    assert " passed" in run.stdout
