"""Kernels compiled for a GPU that is not there, and found again by the next process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_wsi.model.init_checkpoint import init_checkpoint
from vllm_wsi.model.tiny_settings import TinySettings

pytestmark = pytest.mark.slow


def command(*arguments, cache):
    program = Path(sys.executable).parent / "vllm-wsi"
    return subprocess.run(
        [program, "compile", *map(str, arguments)],
        env=os.environ | {"TRITON_CACHE_DIR": str(cache)}, capture_output=True, text=True,
    )  # fmt: skip


def compiled(cache):
    return {path.name for path in cache.rglob("*.cubin")}


def test_a_checkpoints_kernels_lie_in_the_cache_and_are_compiled_once(tmp_path):
    init_checkpoint(tmp_path / "c", TinySettings(feature_dim=256, hidden_size=32, scorer_hidden_size=16))
    cache = tmp_path / "cache"
    first = command("--checkpoint", tmp_path / "c", "--arch", "sm_90", cache=cache)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(f"9 kernels for sm_90 in {cache}, by Triton ")
    kernels = ["_score_topk_kernel.cubin", "_score_kernel.cubin", "_select_kernel.cubin"]
    assert compiled(cache) == set(kernels)
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("*.cubin")}
    assert len(times) == 9  # three dtypes: one launch for K to 32, and two launches for K to 256
    again = command("--checkpoint", tmp_path / "c", "--arch", "sm_90", cache=cache)
    assert again.stdout.startswith("9 kernels")
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.cubin")} == times


@pytest.mark.parametrize("arch", ["sm_75", "sm_x", "hopper", ""])
def test_an_architecture_is_named_as_nvidia_does(arch, tmp_path):
    init_checkpoint(tmp_path / "c", TinySettings(feature_dim=64, hidden_size=32, scorer_hidden_size=16))
    done = command("--checkpoint", tmp_path / "c", "--arch", arch, cache=tmp_path / "cache")
    assert done.returncode == 1
    assert f"--arch: found {arch!r}, wanted sm_80 .. sm_130" in done.stderr
