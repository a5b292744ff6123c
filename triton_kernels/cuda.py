"""Which kernels score and select an input on CUDA."""

from __future__ import annotations

from torch import Tensor

from .buffers import stream_workspace
from .fused import score_topk_triton
from .launch_table import card_of, fused_config, supports
from .reference import MAX_FAST_K, Running, ScorerWeights, Selected, score_patches, select_topk
from .score import score_triton
from .select import select_triton


def score_topk_cuda(
    features: Tensor,
    weights: ScorerWeights,
    k: int,
    cu_seqlens: Tensor | None,
    first_row: int,
    running: Running | None,
    by_score: bool,
) -> tuple[Selected, Tensor]:
    """One launch where it fits the card; else a launch for the scores and one for the Top-K; else PyTorch.

    Returns:
        The kept patches, and the scores of all rows, fp32 [N]. They are the same, whatever was launched.
    """
    slides = (cu_seqlens, first_row, running, by_score)
    if k > MAX_FAST_K:
        scores = _scores(features, weights, first_row)
        return select_topk(scores, k, features, *slides), scores
    workspace = stream_workspace(features.device, 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1)
    config = fused_config(card_of(features.device), weights, features.dtype, k) if supports(features, weights) else None
    if config is not None:
        return score_topk_triton(features, weights, k, config, *slides, workspace)
    scores = _scores(features, weights, first_row)
    return select_triton(scores, k, features, *slides, workspace), scores


def _scores(features: Tensor, weights: ScorerWeights, first_row: int) -> Tensor:
    if supports(features, weights):
        return score_triton(features, weights)
    return score_patches(features, weights, first_row)
