"""vLLM's V2 model runner, the one that GPUs use: the same engine tests in a process where it runs on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine
HERE = Path(__file__).parent
RUNNER = """
from vllm import LLM
llm = LLM({checkpoint!r}, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4)
executor = llm.llm_engine.engine_core.engine_core.model_executor
print("runner:", executor.driver_worker.worker.model_runner.__class__.__mro__)
"""
CASES = "qwen2-original or llama-packed or prefix_cache or preempted or position_mode or kept_patches"


def run(*command):
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE / "process_start"), os.environ.get("PYTHONPATH", "")]),
        "WSI_TESTS_V2": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run([sys.executable, *command], env=env, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


def test_the_process_runs_the_runner_of_gpus(checkpoint):
    out = run("-c", RUNNER.format(checkpoint=str(checkpoint)))
    assert "vllm.v1.worker.gpu.model_runner.GPUModelRunner" in out.split("runner:")[1]


@pytest.mark.timeout(900)
def test_parity_positions_prefix_cache_pieces_and_preemption_hold_on_it():
    out = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_parity.py"), "-k", CASES)
    assert "6 passed" in out
