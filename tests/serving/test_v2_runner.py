"""vLLM's V2 model runner, the one that GPUs use: the same engine tests in a process where it runs on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine
HERE = Path(__file__).parent
CASES = "qwen2-original or llama-packed or prefix_cache or preempted"


@pytest.mark.timeout(900)
def test_parity_positions_prefix_cache_pieces_and_preemption_hold_on_it():
    """Each engine of test_parity.py asserts that it has this runner."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE / "process_start"), os.environ.get("PYTHONPATH", "")]),
        "WSI_TESTS_V2": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TORCH_COMPILE_DISABLE": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(HERE / "test_parity.py"),
        "-k",
        CASES,
    ]
    done = subprocess.run(command, env=env, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "4 passed" in done.stdout
