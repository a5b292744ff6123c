"""Scores of patches on CUDA in a launch of their own, for where the one launch of `fused.py` does not fit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fold import fold_cached
from .launch_table import LaunchConfig, card_of, precision, score_config
from .reference import ScorerWeights
from .tile import score_tile


def score_triton(features: Tensor, weights: ScorerWeights, config: LaunchConfig | None = None) -> Tensor:
    """Scores every row; the torch oracle is `reference.score_patches`.

    Args:
        features: [N, d] that `launch_table.supports` takes.
        weights: on the device of `features`.
        config: another launch configuration, for tests and benchmarks.

    Returns:
        fp32 [N].

    Raises:
        ValueError: features of another d than the weights'.
    """
    n, d = features.shape
    if d != weights.feature_dim:
        raise ValueError(f"features have size {d}, wanted {weights.feature_dim}")
    folded = fold_cached(weights, features.dtype)
    scores = torch.empty(n, dtype=torch.float32, device=features.device)
    if n == 0:
        return scores
    config = config or score_config(card_of(features.device).arch, d, folded.hidden_size, features.dtype)
    _score_kernel[(triton.cdiv(n, config.block_m),)](
        features, features.stride(0), *folded.pointers(), folded.eps, scores, n,
        D=d, H=folded.padded_hidden_size, BLOCK_M=config.block_m, BLOCK_K=config.block_k,
        PRECISION=precision(features.dtype, folded.hidden_size), **config.options(),
    )  # fmt: skip
    return scores


# Many parameters: a Triton kernel takes each pointer and each size by itself.
@triton.jit(do_not_specialize=["n"])
def _score_kernel(
    x_ptr, x_stride, weight_ptr, column_sum_ptr, bias_ptr, out_weight_ptr, out_bias_ptr, eps, scores_ptr, n,
    D: tl.constexpr, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows behind the end repeat the last one: unpredicated loads, and their scores are not stored.
    x_row = x_ptr + tl.minimum(row, n - 1).to(tl.int64) * x_stride
    score = score_tile(
        x_row,
        weight_ptr,
        column_sum_ptr,
        bias_ptr,
        out_weight_ptr,
        out_bias_ptr,
        eps,
        D,
        H,
        BLOCK_M,
        BLOCK_K,
        PRECISION,
    )
    tl.store(scores_ptr + row, score, mask=row < n)
