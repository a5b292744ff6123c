"""Runs the folder `interpreted` in Triton's interpreter, which must be chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.timeout(1800)  # minutes of interpreting, which busy cores double
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_the_interpreted_kernels_pass(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / file)]
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=FOLDER.parents[2], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-5000:]
    assert " passed" in run.stdout
