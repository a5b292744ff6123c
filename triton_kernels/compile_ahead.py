"""Fills Triton's cache for a GPU that is not there, so that a container image brings its kernels compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from .buffers import Workspace
from .fused import score_topk_triton
from .launch_table import DTYPES, Card, fused_config, score_config, supports
from .reference import ScorerWeights
from .score import score_triton
from .select import select_triton
from .vectors import vectors_triton


def compile_ahead(weights: ScorerWeights, sizes: Sequence[int], arch: int) -> int:
    """Compiles what `score_topk` launches for this scorer, for features of every dtype and slides of any length.

    Triton writes to its cache (`TRITON_CACHE_DIR`); what is there already takes no time.

    Args:
        weights: on the CPU.
        sizes: the K of selections, at most 256.
        arch: 80, 86, 89, 90, 100, 120 and the like.

    Returns:
        The number of kernels.
    """
    card, workspace, count = Card(arch, 1), Workspace("cpu"), 0
    with card_that_is_not_there(arch):
        for dtype in DTYPES:
            x = torch.zeros(16, weights.feature_dim, dtype=dtype)
            scores, taken = torch.zeros(16), supports(x, weights)
            for k in sizes:
                config = fused_config(card, weights, dtype, k) if taken else None
                if config is None:
                    select_triton(scores, k, x, workspace=workspace)
                else:
                    score_topk_triton(x, weights, k, config, workspace=workspace)
                count += 1
            if taken and any(fused_config(card, weights, dtype, k) is None for k in sizes):
                score_triton(x, weights, score_config(arch, weights.feature_dim, weights.hidden_size, dtype))
                count += 1
    return count


def compile_vectors_ahead(weights: ScorerWeights, arch: int) -> int:
    """The same of a scorer with R outputs: the kernel of `gpu_vectors`, for features of every dtype that it takes."""
    inputs = [torch.zeros(16, weights.feature_dim, dtype=dtype) for dtype in DTYPES]
    taken = [x for x in inputs if weights.hidden_size and supports(x, weights)]
    with card_that_is_not_there(arch):
        for x in taken:
            vectors_triton(x, weights, score_config(arch, weights.feature_dim, weights.hidden_size, x.dtype))
    return len(taken)


@contextmanager
def card_that_is_not_there(arch: int) -> Iterator[None]:
    """Within it, Triton compiles for this architecture, and a launch does nothing."""
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(arch))
    try:
        yield
    finally:
        triton.runtime.driver._active = before


class _Driver:
    """What Triton asks of a driver, up to the launch."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30}

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        """(module, function, registers, spills, threads)"""
        return 0, 0, 0, 0, 1024

    def launcher_cls(self, *_: Any) -> Any:
        return lambda *_: None
