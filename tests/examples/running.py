"""Runs an example as a reader does: a process of its own, by the path of its file."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run_example(name, *arguments, cwd, **environment) -> str:
    """What `python examples/NAME ARGUMENTS` prints, run in the folder `cwd`."""
    env = {**os.environ, "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()
