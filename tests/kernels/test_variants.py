"""How often a server compiles: whatever slides and K it meets, few variants of the kernel are asked for."""

import random

import pytest
import torch
import triton

from vllm_wsi.kernels.buffers import Workspace
from vllm_wsi.kernels.compile_ahead import card_that_is_not_there
from vllm_wsi.kernels.fused import score_topk_triton
from vllm_wsi.kernels.launch_table import FusedConfig, LaunchConfig
from vllm_wsi.kernels.reference import Running
from vllm_wsi.kernels.score import score_triton
from vllm_wsi.kernels.select import select_triton
from vllm_wsi.selection.scorer import seeded_scorer

CONFIG = FusedConfig(LaunchConfig(128, 64, 8, 3), 132)
NUM_SLIDES = 2000


@pytest.fixture
def asked_for(monkeypatch):
    """The kernels' variants that were asked for, by Triton's own keys."""
    found = set()

    def hook(*, key, fn, **_):
        found.add((fn.name, key))
        return True  # not compiled

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
    with card_that_is_not_there(90):
        yield found


def slides_of_a_server(seed=0):
    """(features [n, 256] of every length, k): chunks of slides, never read."""
    numbers = random.Random(seed)
    for n in [0, 1, 15, 16, 17, 2**15, *(int(10 ** numbers.uniform(0, 5.3)) for _ in range(NUM_SLIDES))]:
        yield torch.empty(n, 256, dtype=torch.bfloat16), numbers.choice([1, 2, 5, 16, 31, 32, 33, 100, 256])


def earlier_chunk(k):
    running = [torch.empty(1, k, dtype=torch.int64), torch.empty(1, k, 256, dtype=torch.bfloat16)]
    return Running(*running, torch.empty(1, 32 if k <= 32 else 256, dtype=torch.int64))


def test_two_thousand_slides_of_one_checkpoint_ask_for_two_variants(asked_for):
    weights, workspace = seeded_scorer("patch", 256, 64, seed=0).requires_grad_(False).weights(), Workspace("cpu")
    for number, (x, k) in enumerate(slides_of_a_server()):
        later = number % 3
        running, first_row = (earlier_chunk(k), 1000 * later + number % 2) if later else (None, 0)
        score_topk_triton(x, weights, k, CONFIG, None, first_row, running, number % 5 == 0, workspace)
    assert len(asked_for) == 2  # K to 32, and K to 256


def test_batches_of_slides_ask_for_two_more(asked_for):
    weights, workspace = seeded_scorer("patch", 256, 64, seed=0).requires_grad_(False).weights(), Workspace("cpu", 300)
    for number, (x, k) in enumerate(slides_of_a_server()):
        cu_seqlens = torch.zeros(2 + number % 300, dtype=torch.int32) if number % 2 else None
        score_topk_triton(x, weights, k, CONFIG, cu_seqlens, workspace=workspace)
    assert len(asked_for) == 4


def test_two_launches_ask_for_three_variants(asked_for):
    weights, workspace = seeded_scorer("patch", 256, 64, seed=0).requires_grad_(False).weights(), Workspace("cpu")
    for number, (x, k) in enumerate(slides_of_a_server()):
        scores = score_triton(x, weights, CONFIG.tile)
        running = earlier_chunk(k) if number % 2 else None
        select_triton(scores, k, x, None, 1000 if number % 2 else 0, running, number % 3 == 0, workspace)
    assert len(asked_for) == 3  # the scores, and K to 32, and K to 256
