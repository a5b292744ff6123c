"""Kernels compiled for a GPU that is not there, and found again by the next process."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import triton

from vllm_wsi.kernels.compile_ahead import compile_ahead, compile_vectors_ahead
from vllm_wsi.model.init_checkpoint import init_checkpoint
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.selection.scorer import seeded_scorer

pytestmark = pytest.mark.slow


def command(*arguments, cache):
    program = Path(sys.executable).parent / "vllm-wsi"
    return subprocess.run(
        [program, "compile", *map(str, arguments)],
        env=os.environ | {"TRITON_CACHE_DIR": str(cache)}, capture_output=True, text=True,
    )  # fmt: skip


def test_a_checkpoints_kernels_lie_in_the_cache_and_are_compiled_once(tmp_path):
    """d = 64 is PyTorch's to score, so that only the Top-K is compiled."""
    init_checkpoint(tmp_path / "c", TinySettings(feature_dim=64, hidden_size=32, scorer_hidden_size=16))
    cache = tmp_path / "cache"
    first = command("--checkpoint", tmp_path / "c", "--arch", "sm_90", cache=cache)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(f"6 kernels for sm_90 in {cache}, by Triton ")
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("_select_kernel.cubin")}
    assert len(times) == 6  # three dtypes, K to 32 and to 256
    again = command("--checkpoint", tmp_path / "c", "--arch", "sm_90", cache=cache)
    assert again.stdout.startswith("6 kernels")
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.cubin")} == times


def test_one_launch_and_two_are_compiled_for_each_dtype_that_a_kernel_scores(monkeypatch):
    """By Triton's own keys; nothing is compiled."""
    asked = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda *, fn, **_: asked.append(fn.name) or True)
    weights = seeded_scorer("patch", 256, 16, seed=0).requires_grad_(False).weights()
    assert compile_ahead(weights, [32, 256], 90) == 9
    assert Counter(name.rsplit(".", 1)[-1] for name in asked) == {
        "_score_topk_kernel": 3, "_select_kernel": 3, "_score_kernel": 3,
    }  # fmt: skip


def test_one_launch_for_each_dtype_makes_the_vectors_of_a_scorer_that_hears_the_question(monkeypatch):
    asked = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda *, fn, **_: asked.append(fn.name) or True)
    for h, count in ((16, 3), (0, 0)):  # without a hidden layer PyTorch does it
        scorer = seeded_scorer("question", 256, h, seed=0, rank=4, free_tokens=2, text_size=8).requires_grad_(False)
        assert compile_vectors_ahead(scorer.vector_weights(), 90) == count
    assert Counter(name.rsplit(".", 1)[-1] for name in asked) == {"_vectors_kernel": 3}


@pytest.mark.parametrize("arch", ["sm_75", "sm_x", "hopper", ""])
def test_an_architecture_is_named_as_nvidia_does(arch, tmp_path):
    init_checkpoint(tmp_path / "c", TinySettings(feature_dim=64, hidden_size=32, scorer_hidden_size=16))
    done = command("--checkpoint", tmp_path / "c", "--arch", arch, cache=tmp_path / "cache")
    assert done.returncode == 1
    assert f"--arch: found {arch!r}, wanted sm_80 .. sm_130" in done.stderr
