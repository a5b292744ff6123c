"""One entry for each provider of `providers.py`, grouped by shape, through pytest-benchmark:

    pytest bench/kernels/test_providers.py --benchmark-enable --benchmark-columns=median,iqr,rounds

Wall time of one eager call with the GPU's answer awaited, so the launches are in it; `score_topk.py` separates
them. On a machine without CUDA it runs the smallest shape. Our answer is checked before anything is timed.
"""

from __future__ import annotations

from functools import lru_cache, partial

import pytest
import torch

from bench.kernels.providers import PROVIDERS, Missing, Problem, check, make_problem, tried

CUDA = torch.cuda.is_available()
SHAPES = [(4_000, 512, 128, 32)]  # N, d, h, k
if CUDA:
    SHAPES += [(100_000, 512, 256, 32), (100_000, 1536, 0, 32), (100_000, 1536, 256, 32), (100_000, 1536, 256, 256)]


@lru_cache(maxsize=1)
def checked_problem(n: int, d: int, h: int, k: int) -> Problem:
    torch.manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
    problem = make_problem([n], d, h, k, dtype, torch.device(device))
    check(problem)
    return problem


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "N{}-d{}-h{}-k{}".format(*shape))
def test_provider(benchmark, shape, provider):
    benchmark.group = "N={:,} d={} h={} k={}".format(*shape)
    problem = checked_problem(*shape)
    try:
        call = tried(provider, partial(PROVIDERS[provider], problem))
    except Missing as reason:
        pytest.skip(f"{provider}: {reason}")

    def awaited() -> None:
        call()
        if CUDA:
            torch.cuda.synchronize()

    benchmark(awaited)
