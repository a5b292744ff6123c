"""How the kernels are launched: which inputs they take, and a static table by architecture, d, h and dtype."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import K_BUCKETS, ScorerWeights, padded_k

MIN_DIM, MAX_DIM, DIM_STEP = 256, 2560, 64
MAX_HIDDEN = 512
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SELECT_BLOCK = 1024
"""Scores that a program takes into its Top-K at once."""
SELECT_PARTS = 128
SELECT_WARPS = 8
GATHER_COLUMNS, GATHER_NUMBERS = 256, 256 * 64
"""Of the kept rows, at most, that are copied at once; what follows waits for a whole round to memory."""
LEAN_COLUMNS = 64
"""The same of a linear scorer: more would cost it registers, and so the programs that hide each other's waiting."""
LOOKUP_BLOCK = 16
"""Earlier rows that all kept ones are compared with at once."""


class LaunchConfig(NamedTuple):
    """Launch configuration; BLOCK_K never depends on N, because it decides the order of sums."""

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int | bool]:
        """For Triton. Fused multiply-adds are asked for by name: Triton 3.10 turns them off by default, which would
        change bits."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


class FusedConfig(NamedTuple):
    """Launch configuration of scoring and Top-K in one launch."""

    tile: LaunchConfig  # as `score_config` has it, so that both ways give the same scores
    programs: int  # for each slide, at most
    block: int = SELECT_BLOCK


class Card(NamedTuple):
    """What the table asks of a GPU."""

    arch: int  # 80, 86, 89, 90, 100, 120 and the like
    multiprocessors: int


@functools.cache
def card_of(device: torch.device) -> Card:
    found = torch.cuda.get_device_properties(device)
    return Card(10 * found.major + found.minor, found.multi_processor_count)


def precision(dtype: torch.dtype, hidden_size: int) -> str:
    """How `tl.dot` multiplies X and W.

    fp32 goes through the tensor cores as three products of TF32 parts, which keep 21 of fp32's 24 bits; up to h = 256,
    as beyond it that spills registers.
    """
    return "tf32x3" if dtype == torch.float32 and 0 < hidden_size <= 256 else "ieee"


def top_k_sizes(k: int, feature_dim: int, block: int, hidden_size: int | None = None) -> dict[str, int]:
    """The compile-time sizes of `best.merge_parts`; `hidden_size`: of the scorer in the same launch."""
    k_pad = padded_k(k)
    columns = LEAN_COLUMNS if hidden_size == 0 else GATHER_COLUMNS
    return {
        "K_PAD": k_pad, "BLOCK": max(block, k_pad), "D": feature_dim, "BLOCK_D": min(columns, GATHER_NUMBERS // k_pad),
        "LOOKUP": min(k_pad, LOOKUP_BLOCK),
    }  # fmt: skip


def supports(features: Tensor, weights: ScorerWeights) -> bool:
    """Whether the kernels take this input. For any other input the reference is used."""
    d = features.shape[1]
    return (
        features.dtype in DTYPES
        and features.stride(1) == 1
        and MIN_DIM <= d <= MAX_DIM
        and d % DIM_STEP == 0
        and weights.hidden_size <= MAX_HIDDEN
    )


def score_config(arch: int, feature_dim: int, hidden_size: int, dtype: torch.dtype) -> LaunchConfig:
    """The configuration from a static table by (architecture, d, h). It does not depend on N, because that would change
    the bits of a slide's scores.

    Args:
        arch: 80, 86, 89, 90, 100, 120 and the like.
    """
    if hidden_size == 0:
        sizes = (128, 64) if dtype == torch.float32 else (256, 128, 64)
        block_k = next(size for size in sizes if feature_dim % size == 0)
        return LaunchConfig(16, block_k, 4, 1)
    if dtype == torch.float32:
        # With 64 rows and h > 128, Triton 3.7 makes an empty kernel of the TF32 parts on sm_100 (docs/kernels.md).
        if hidden_size > 256 or (hidden_size > 128 and 100 <= arch < 120):
            return LaunchConfig(32, 32, 8, 2)
        return LaunchConfig(64, 32 if hidden_size <= 128 else 16, 8, 2)
    # Chosen by compiling ahead of time: the largest tiles that spill no register (tests/kernels/test_compile.py).
    small_shared_memory = arch in (86, 89) or arch >= 120
    if hidden_size > 256:
        return LaunchConfig(64, 32, 8, 2) if small_shared_memory else LaunchConfig(64, 64, 8 if arch < 90 else 16, 2)
    if hidden_size > 128:
        if small_shared_memory:
            return LaunchConfig(64, 64, 8, 2)
        return LaunchConfig(128, 32, 8, 3) if arch < 90 else LaunchConfig(128 if arch < 100 else 64, 64, 8, 3)
    if small_shared_memory or arch < 90:
        return LaunchConfig(128, 64, 8, 2)
    if arch < 100:
        return LaunchConfig(128, 64, 4, 3)  # two or three programs on a multiprocessor hide each other's GELU
    return LaunchConfig(256 if hidden_size <= 64 else 128, 64, 8, 3)


def fused_config(card: Card, weights: ScorerWeights, dtype: torch.dtype, k: int) -> FusedConfig | None:
    """How one launch scores and selects; None where it would spill registers, and two launches do it.

    Args:
        weights: of a scorer that `supports` takes.
    """
    h = weights.hidden_size
    if h > 256 or k > K_BUCKETS[0]:
        return None  # bench/results/compiled.csv: they spill
    tile = score_config(card.arch, weights.feature_dim, h, dtype)
    at_once = 3 if h == 0 else 1
    if card.arch == 90 and h and dtype != torch.float32:
        at_once = 3 if h <= 64 else 2 if h <= 128 else 1
    return FusedConfig(tile, at_once * card.multiprocessors)
