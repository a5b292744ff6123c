"""FSDP's shards change no step. PyTorch's own `fully_shard` on gloo: accelerate shards on accelerators alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def run(dtype: str, policy: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).with_name("fsdp_process.py")), dtype, policy]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_in_two_shards_has_the_gradients_of_one_without(dtype):
    """dtype: of the decoder."""
    done = run(dtype, "plain")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["names"]
    assert abs(found["loss"]) < 1e-6
    assert found["error"] < 1e-6
    assert all(largest > 1e-5 for largest in found["largest"].values())  # of scorer, projector and adapters
    assert 0.49 < found["share"] < 0.52


def test_a_scorer_in_half_precision_is_refused():
    done = run("float32", "mixed")
    assert done.returncode != 0
    assert (
        "trainer: found the scorer in bfloat16 within a step, wanted float32; under FSDP leave out bf16" in done.stderr
    )
