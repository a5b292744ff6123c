"""`score_topk` as a PyTorch operator: one entry for every device, visible to `torch.compile`. No logic but dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .launch_table import supports
from .reference import Running, ScorerWeights, Selected, padded_k, score_patches, select_topk


class ScoredTopK(NamedTuple):
    """The kept patches of S slides, and the scores of all. Places without a patch: -1, -inf, zeros."""

    indices: Tensor  # int64 [S, k], rows within their slide
    scores: Tensor  # fp32 [S, k]
    rows: Tensor  # [S, k, d], the features' dtype
    keys: Tensor  # int64 [S, k_pad], for the next chunk of a streamed slide
    all_scores: Tensor  # fp32 [N]


def score_topk(
    features: Tensor,
    weights: ScorerWeights,
    k: int,
    *,
    cu_seqlens: Tensor | None = None,
    first_row: int = 0,
    running: ScoredTopK | None = None,
    by_score: bool = False,
) -> ScoredTopK:
    """Scores every patch and keeps the k best of each slide (Hard Top-K).

    On CUDA one launch does it, where it takes the input (`launch_table.supports`); elsewhere, and on the CPU, PyTorch
    does, with the same meaning. Ties go to the lower row; a score that is not finite is never kept.

    Args:
        features: [N, d], all slides one after another.
        weights: fp32, on the features' device.
        k: at least 1; up to 256 on the fast path.
        cu_seqlens: int32 or int64 [S + 1], where each slide begins and ends; None: one slide.
        first_row: row of `features[0]` within its slide, for a slide that arrives in chunks.
        running: what the slide's earlier chunks gave, for the same k and order.
        by_score: order the kept by score instead of by row.

    Raises:
        ValueError: features of another d than the weights'; k or a row that is out of range.
    """
    if features.shape[1] != weights.feature_dim:
        raise ValueError(f"features have size {features.shape[1]}, wanted {weights.feature_dim}")
    before = None if running is None else Running(running.indices, running.rows, running.keys)
    if torch.compiler.is_compiling():
        kept = [] if running is None else [running.indices, running.rows, running.keys]
        tensors = weights.tensors()
        return ScoredTopK(*_operator(features, tensors, weights.norm_eps, k, cu_seqlens, first_row, kept, by_score))
    # Not through the operator: its first call imports PyTorch's compiler, and the first slide would wait for seconds.
    return _run(features, weights, k, cu_seqlens, first_row, before, by_score)


def _run(
    features: Tensor,
    weights: ScorerWeights,
    k: int,
    cu_seqlens: Tensor | None,
    first_row: int,
    running: Running | None,
    by_score: bool,
) -> ScoredTopK:
    on_device = _on_cuda if features.is_cuda else _on_cpu
    return on_device(features, weights, k, cu_seqlens, first_row, running, by_score)


def _on_cpu(
    features: Tensor,
    weights: ScorerWeights,
    k: int,
    cu_seqlens: Tensor | None,
    first_row: int,
    running: Running | None,
    by_score: bool,
) -> ScoredTopK:
    scores = score_patches(features, weights, first_row)
    return _with_scores(select_topk(scores, k, features, cu_seqlens, first_row, running, by_score), scores)


def _on_cuda(
    features: Tensor,
    weights: ScorerWeights,
    k: int,
    cu_seqlens: Tensor | None,
    first_row: int,
    running: Running | None,
    by_score: bool,
) -> ScoredTopK:
    from .cuda import score_topk_cuda  # Triton is imported where a GPU first asks for it

    with torch.cuda.device(features.device):
        return _with_scores(*score_topk_cuda(features, weights, k, cu_seqlens, first_row, running, by_score))


def gpu_vectors(features: Tensor, weights: ScorerWeights) -> Tensor | None:
    """fp32 [N, R] of a scorer with R outputs, in one launch on CUDA; no gradient passes. None where no kernel takes the
    input, and `reference.score_vectors` has to do it.

    Args:
        features: [N, d].
        weights: on the features' device; `out_weight` [R, h] and `out_bias` [R].
    """
    if not (features.is_cuda and weights.hidden_size and supports(features, weights)):
        return None
    from .vectors import vectors_triton

    with torch.cuda.device(features.device):
        return vectors_triton(features, weights)


def _with_scores(selected: Selected, scores: Tensor) -> ScoredTopK:
    assert selected.rows is not None
    return ScoredTopK(selected.indices, selected.scores, selected.rows, selected.keys, scores)


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""A `ScoredTopK` as PyTorch's operators return it."""


@torch.library.custom_op("vllm_wsi::score_topk", mutates_args=())
def _operator(
    features: Tensor,
    parameters: Sequence[Tensor],
    norm_eps: float,
    k: int,
    cu_seqlens: Tensor | None,
    first_row: int,
    running: Sequence[Tensor],
    by_score: bool,
) -> Outputs:
    weights = ScorerWeights.of_tensors(parameters, norm_eps)
    before = Running(*running) if running else None
    return tuple(_run(features, weights, k, cu_seqlens, first_row, before, by_score))  # type: ignore[return-value]


@_operator.register_fake
def _shapes(
    features: Tensor,
    parameters: Sequence[Tensor],
    norm_eps: float,
    k: int,
    cu_seqlens: Tensor | None,
    first_row: int,
    running: Sequence[Tensor],
    by_score: bool,
) -> Outputs:
    num_slides = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        features.new_empty((num_slides, k), dtype=torch.int64),
        features.new_empty((num_slides, k), dtype=torch.float32),
        features.new_empty((num_slides, k, features.shape[1])),
        features.new_empty((num_slides, padded_k(k)), dtype=torch.int64),
        features.new_empty((features.shape[0],), dtype=torch.float32),
    )
